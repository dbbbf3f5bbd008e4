"""What processors and graphics cards are called."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """The name of a processor or of a graphics card; of devices that tell none, their type."""
    if device.type == "cpu":
        return cpu_name()
    try:
        return str(torch.get_device_module(device).get_device_name(device))
    except (AttributeError, RuntimeError):
        return f"{cpu_name()}, {device.type}"


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
