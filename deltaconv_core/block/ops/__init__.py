"""Operators of the block, free of layers: backends, the choice among them, and the steps that they share."""

from .backend import Backend
from .by_torch import context, enlarge, gate, joined, merge, shrink, stage_size
from .choose import (
    at_once_backend_for,
    backend_for,
    backend_for_convolution,
    compute_dtype,
    planes_backend_for,
)
from .float16 import half_product, scale_rows

__all__ = [
    "Backend",
    "at_once_backend_for",
    "backend_for",
    "backend_for_convolution",
    "compute_dtype",
    "context",
    "enlarge",
    "gate",
    "half_product",
    "joined",
    "merge",
    "planes_backend_for",
    "scale_rows",
    "shrink",
    "stage_size",
]
