"""For the soak's server: the small MODEL's nodes, one that makes a MODEL fail, and a look at the process."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections import Counter
from pathlib import Path

import comfy.model_management
import torch
from aiohttp import web
from server import PromptServer

from testing.plain_nodes.plain_pack import NODE_CLASS_MAPPINGS as PLAIN

ERRORS = {
    "out of memory": comfy.model_management.OOM_EXCEPTION,
    "RuntimeError": RuntimeError,
    "MemoryError": MemoryError,
    "ValueError": ValueError,
}
COUNTED = ("ModelPatcher", "DeltaConvBlock", "DeltaConvBlocks", "AppliedBlocks", "Checkpoint", "UNetModel")


class SoakFail:
    """A MODEL whose network raises an error in the middle, from a call on."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "run"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "error": (list(ERRORS),),
                "call": ("INT", {"default": 1}),
                "once": ("INT", {"default": 0}),  # another value, and the node runs again
            }
        }

    def run(self, model, error, call, once):
        calls = []

        def fail(x, options):
            calls.append(1)
            if len(calls) >= call:
                raise ERRORS[error](f"injected: {error}")
            return x

        clone = model.clone()
        clone.set_model_patch(fail, "middle_patch")
        return (clone,)


NODE_CLASS_MAPPINGS = {**PLAIN, "SoakFail": SoakFail}


@PromptServer.instance.routes.get("/soak")
async def look(request: web.Request) -> web.Response:
    """What the process holds, after everything that can be given back was."""
    gc.collect()
    if hasattr(ctypes.pythonapi, "PyObject_Malloc") and Path("/proc/self/statm").is_file():
        ctypes.CDLL(None).malloc_trim(0)
    objects = gc.get_objects()
    names = Counter(type(thing).__name__ for thing in objects)
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in objects)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    found = {
        "memory": pages * os.sysconf("SC_PAGE_SIZE"),
        "objects": len(objects),
        "tensors": tensors,
        "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")),
        **{name: names[name] for name in COUNTED},
    }
    return web.json_response(found)
