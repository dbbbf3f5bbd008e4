"""Measuring: what self-attention costs on this machine, and what ΔConv costs in its place."""

from ..block.ops.fastest import synchronize
from ..util.devices import DTYPES, device_name, pick_device, pick_dtype
from .counting import count_flops
from .layers import Layer, LayerCost, SelfAttention, layer_cost, layers_of, measure_layers
from .machine import copy_bandwidth, describe, matmul_rate
from .sizes import LATENT, latent_of, parse_size
from .table import layer_table, sums
from .timing import Span, alternate

__all__ = [
    "DTYPES",
    "LATENT",
    "Layer",
    "LayerCost",
    "SelfAttention",
    "Span",
    "alternate",
    "copy_bandwidth",
    "count_flops",
    "describe",
    "device_name",
    "latent_of",
    "layer_cost",
    "layer_table",
    "layers_of",
    "matmul_rate",
    "measure_layers",
    "parse_size",
    "pick_device",
    "pick_dtype",
    "sums",
    "synchronize",
]
