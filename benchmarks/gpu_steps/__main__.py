"""Runs one step; see `benchmarks.gpu`."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import torch

from deltaconv_core.bench import machine as machine_sizes

from ..gpu import UNFINISHED
from .blocks import blocks, training
from .check import check
from .compile import compile_all
from .kernels import kernels
from .machine import machine
from .models import large, large_model, models
from .profile import once, profile
from .run import Run

UNUSED = ("transformers", "torchvision", "peft", "accelerate")  # what diffusers would import for seconds
STEPS: dict[str, Callable[[Run], None]] = {
    "machine": machine,
    "compile": compile_all,
    "check": check,
    "kernels": kernels,
    "blocks": blocks,
    "models": models,
    "training": training,
    "large": large,
    "large-model": large_model,
    "profile": profile,
    **{f"once {which}": partial(once, which) for which in ("depthwise", "tensor cores", "project")},
}


def main() -> int:
    command = argparse.ArgumentParser()
    command.add_argument("step")
    command.add_argument("output", type=Path)
    command.add_argument("--cpu", action="store_true")
    args = command.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    if args.cpu:
        torch.set_num_threads(1)
        machine_sizes.COPIED, machine_sizes.SIDE = {"cpu": 2**20}, {"cpu": 64}
    for name in ("triton", "deltaconv_core.block.ops.triton.project"):  # imported while others run
        try:
            import_module(name)
        except Exception as error:
            print(f"{name}: {error}", file=sys.stderr)
    if args.step in ("models", "large-model"):
        for name in UNUSED:
            sys.modules[name] = None  # type: ignore[assignment]
        try:
            import_module("deltaconv_core.diffusers")
            import_module("diffusers").UNet2DConditionModel  # noqa: B018 (imported when asked for)
        except Exception as error:
            print(f"diffusers: {error}", file=sys.stderr)
    print("ready", flush=True)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nobody reads on
    line = sys.stdin.readline()
    if not line:
        return 0
    run = Run(args.step, args.output, float(line), args.cpu)
    STEPS[args.step](run)
    return UNFINISHED if run.unfinished else 0


if __name__ == "__main__":
    sys.exit(main())
