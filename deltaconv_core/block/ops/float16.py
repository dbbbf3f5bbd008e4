"""float16 without overflow: large rows are scaled around a product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

ROW_LIMIT = 2.0**12  # largest entry given to a float16 product: sums of many such entries stay below 65504


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
