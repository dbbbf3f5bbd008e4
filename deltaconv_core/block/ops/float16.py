"""float16 without overflow: avoided where it is slow, elsewhere large rows are scaled around a product."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import fastest
from .layer_weights import call_layer

ROW_LIMIT = 2.0**12  # largest entry given to a float16 product: sums of many such entries stay below 65504
TRIAL_TOKENS = 256


def compute_dtype(x: Tensor) -> torch.dtype:
    """In which dtype to mix the tokens x (B, N, C): x's own, except on a CPU.

    There it is float32 for float16, whose kernels are 60 to 240 times slower, and for bfloat16 where a matrix
    product is faster in float32: without instructions for bfloat16 it is about ten times as fast.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float16, torch.bfloat16):
        return x.dtype
    if x.dtype == torch.float16:
        return torch.float32
    part = x[0, :TRIAL_TOKENS]
    return fastest.fastest(
        "product",
        {"as it is": torch.bfloat16, "in float32": torch.float32},
        default="as it is",
        like=x,
        details=("channels", x.shape[2]),
        tokens=len(part),
        trial=lambda dtype: part.to(dtype) @ part.to(dtype).T,
    )


def scale_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x = rows * scale with float16 rows whose entries are at most ROW_LIMIT, for x beyond float16's range.

    The scale is a power of two, 1 unless an entry exceeds ROW_LIMIT: exact apart from the rounding of
    float16 itself.

    Args:
        x: (..., c) float32.

    Returns:
        rows (..., c) float16, scale (..., 1) float32.
    """
    peak = x.detach().abs().amax(dim=-1, keepdim=True)
    scale = torch.exp2(torch.log2(peak / ROW_LIMIT).ceil().clamp(min=0))
    return (x / scale).half(), scale


def half_product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in float16 and scaled back: (..., c) float32 and (C, c) float16 -> (..., C) float32."""
    rows, scale = scale_rows(x)
    return F.linear(rows, weight).float() * scale


def project_half(layer: nn.Linear, x: Tensor, offset: Tensor) -> Tensor:
    """layer(x) + offset with the matrix product in float16, for a float32 x beyond float16's range.

    Args:
        layer: a Linear with bias, c -> C.
        x: (B, N, c) float32.
        offset: (B, 1, C).

    Returns:
        (B, N, C) float32.
    """
    rows, scale = scale_rows(x)
    y = call_layer(layer, rows).float() * scale
    return y + layer.bias.to(y) * (1 - scale) + offset.float()
