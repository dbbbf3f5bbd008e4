"""Measuring: what self-attention costs on this machine, and what ΔConv costs in its place."""

from ..block.ops.fastest import synchronize
from ..util.devices import DTYPES, device_name, pick_device, pick_dtype
from .counting import count_flops
from .layers import Layer, SelfAttention, StageCost, layers_of, measure_stages, stage_cost
from .machine import copy_bandwidth, describe, matmul_rate
from .sizes import LATENT, latent_of, parse_size
from .table import stage_table, sums
from .timing import Span, alternate

__all__ = [
    "DTYPES",
    "LATENT",
    "Layer",
    "SelfAttention",
    "Span",
    "StageCost",
    "alternate",
    "copy_bandwidth",
    "count_flops",
    "describe",
    "device_name",
    "latent_of",
    "layers_of",
    "matmul_rate",
    "measure_stages",
    "parse_size",
    "pick_device",
    "pick_dtype",
    "stage_cost",
    "stage_table",
    "sums",
    "synchronize",
]
