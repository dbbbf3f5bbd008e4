"""Which machine this is, and how fast it copies and multiplies."""

from __future__ import annotations

import os
import statistics
from typing import Any

import torch

from ..util.devices import cpu_name, device_name
from .timing import alternate

COPIED = {"cpu": 2**28}  # bytes; elsewhere 2**30
SIDE = {"cpu": 2048}  # of the matrices; elsewhere 8192
REPEATS = 5


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
