"""Modules inside of other modules that call them."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def inside(module: nn.Module) -> nn.Module:
    """The module in the wrappers of `torch.compile` and of training in several processes; else itself."""
    while True:
        inner = module.module if isinstance(module, DistributedDataParallel) else None
        inner = getattr(module, "_orig_mod", inner)
        if not isinstance(inner, nn.Module):
            return module
        module = inner
