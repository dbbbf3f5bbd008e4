"""float16 without overflow: avoided where it is slow, elsewhere large rows are scaled around a product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layers import call_layer

ROW_LIMIT = 2.0**12  # largest entry given to a float16 product: sums of many such entries stay below 65504


def compute_dtype(x: Tensor) -> torch.dtype:
    """float32 for float16 on a CPU, whose float16 kernels are 60 to 240 times slower; otherwise x's own."""
    return torch.float32 if x.dtype == torch.float16 and x.device.type == "cpu" else x.dtype


def project_half(layer: nn.Linear, x: Tensor, offset: Tensor) -> Tensor:
    """layer(x) + offset with the matrix product in float16, for a float32 x beyond float16's range.

    Each row is divided by a power of two (1 unless an entry exceeds ROW_LIMIT), multiplied, and scaled back
    in float32: exact apart from the rounding of float16 itself.

    Args:
        layer: a Linear with bias, c -> C.
        x: (B, N, c) float32.
        offset: (B, 1, C).

    Returns:
        (B, N, C) float32.
    """
    peak = x.detach().abs().amax(dim=-1, keepdim=True)
    scale = torch.exp2(torch.log2(peak / ROW_LIMIT).ceil().clamp(min=0))
    y = call_layer(layer, (x / scale).half()).float() * scale
    return y + layer.bias.to(y) * (1 - scale) + offset.float()
