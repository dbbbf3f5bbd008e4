"""Devices and dtypes: their names, and which one is meant."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from ..errors import DeltaConvError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHORT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def device_name(device: torch.device) -> str:
    """The name of a processor or of a graphics card; of devices that have none, their type."""
    if device.type == "cpu":
        return cpu_name()
    try:
        return str(torch.get_device_module(device).get_device_name(device))
    except (AttributeError, RuntimeError):
        return f"{cpu_name()}, {device.type}"


def cpu_name() -> str:
    """The processor's own name where the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


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


def float64_device(device: torch.device) -> torch.device:
    """Where to compute in float64 what is on a device: Apple's GPUs and some of Intel's cannot."""
    return device if device.type == "cuda" else torch.device("cpu")


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
