"""Operators of the block, free of weights: backends, the choice among them, and the steps that they share."""

from .backend import Backend
from .choose import backend_for
from .float16 import compute_dtype, half_product, project_half
from .layer_weights import call_layer, gives_weights, no_autocast, with_weights
from .pyramid import context, enlarge, gate, merge, shrink, stage_size

__all__ = [
    "Backend",
    "backend_for",
    "call_layer",
    "compute_dtype",
    "context",
    "enlarge",
    "gate",
    "gives_weights",
    "half_product",
    "merge",
    "no_autocast",
    "project_half",
    "shrink",
    "stage_size",
    "with_weights",
]
