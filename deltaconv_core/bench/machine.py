"""Which machine this is, and how fast it copies and multiplies."""

from __future__ import annotations

import os
import statistics
from typing import Any

import torch

from ..errors import DeltaConvError
from ..util.devices import cpu_name, device_name
from .timing import alternate

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
COPIED = {"cpu": 2**28}  # bytes; elsewhere 2**30
SIDE = {"cpu": 2048}  # of the matrices; elsewhere 8192
REPEATS = 5


def pick_device(name: str | None = None) -> torch.device:
    """The named device, else the first CUDA device where there is one, else the CPU.

    Raises:
        DeltaConvError: a device that PyTorch does not find here.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DeltaConvError(
            f"PyTorch cannot use the device {name!r}: {str(error).splitlines()[0]}"
        ) from error
    return device


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The named dtype; None: float32 on a CPU, float16 elsewhere.

    Raises:
        DeltaConvError: float16 on a CPU, in which nobody computes.
    """
    on_cpu = device.type == "cpu"
    dtype = DTYPES[name or ("float32" if on_cpu else "float16")]
    if dtype == torch.float16 and on_cpu:
        raise DeltaConvError(
            "float16 on a CPU is many times slower than float32, so ΔConv computes in float32 there; measure "
            "float32 or bfloat16"
        )
    return dtype


def describe(device: torch.device) -> dict[str, Any]:
    """The kind of the machine, and what else times depend on."""
    described: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    return described if device.type == "cpu" else {"gpu": device_name(device), **described}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second read and written, by copying a large tensor."""
    size = COPIED.get(device.type, 2**30)
    source, target = (torch.zeros(size, dtype=torch.int8, device=device) for _ in range(2))
    times = alternate({"copy": lambda: target.copy_(source)}, device, REPEATS)
    return 2 * size / statistics.median(times["copy"])


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations per second in a product of two large square matrices."""
    side = SIDE.get(device.type, 8192)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = alternate({"product": lambda: a @ b}, device, REPEATS)
    return 2 * side**3 / statistics.median(times["product"])
