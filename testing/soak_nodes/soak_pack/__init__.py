"""For the soak's server: the small MODEL's nodes, one that makes a MODEL fail, and a look at the process."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
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


class _MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`, of all arenas together."""

    NAMES = (
        *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
        *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
    )
    _fields_ = tuple((name, ctypes.c_size_t) for name in NAMES)


NODE_CLASS_MAPPINGS = {**PLAIN, "SoakFail": SoakFail}


@PromptServer.instance.routes.get("/soak")
async def look(request: web.Request) -> web.Response:
    """What the process holds, after everything that can be given back was; with glibc alone."""
    gc.collect()
    objects = gc.get_objects()
    names = Counter(type(thing).__name__ for thing in objects)
    found = {
        "objects": len(objects),
        "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in objects),
        "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")),
        **{name: names[name] for name in COUNTED},
    }
    del objects, names  # which held what was about to go
    gc.collect()
    library = ctypes.CDLL(None)
    library.malloc_trim(0)
    library.mallinfo2.restype = _MallInfo
    malloc = library.mallinfo2()
    found["python blocks"] = sys.getallocatedblocks()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    found["resident"] = pages * os.sysconf("SC_PAGE_SIZE")
    found["in use"] = malloc.uordblks + malloc.hblkhd
    return web.json_response(found)
