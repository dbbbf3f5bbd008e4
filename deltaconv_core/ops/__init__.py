"""Operators of the block: plain PyTorch functions, free of weights."""

from .half import compute_dtype, project_half
from .layers import call_layer
from .pyramid import context, enlarge, gate, merge, shrink, stage_size

__all__ = [
    "call_layer",
    "compute_dtype",
    "context",
    "enlarge",
    "gate",
    "merge",
    "project_half",
    "shrink",
    "stage_size",
]
