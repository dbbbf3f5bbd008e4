"""The steps of a pyramid stage as functions on (B, channels, H, W), in any memory layout."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int]


def stage_size(grid: Size, scale: float) -> Size:
    """Rows and columns of a stage: int(side * scale), at least 1."""
    return max(1, int(grid[0] * scale)), max(1, int(grid[1] * scale))


def shrink(x: Tensor, scale: float, pooling: str) -> Tensor:
    """(B, c, H, W) -> (B, c, *stage_size), by adaptive average pooling or bilinear interpolation.

    Bilinear samples at (i + 1/2) / scale - 1/2, as the authors' earlier block does: on odd sizes the step is
    1 / scale and not the ratio of the sizes.
    """
    height, width = x.shape[2:]
    size = stage_size((height, width), scale)
    if pooling == "average" and (height, width) == (2 * size[0], 2 * size[1]):
        return F.avg_pool2d(x, 2)  # the same windows, without working them out
    if pooling == "average":
        return F.adaptive_avg_pool2d(x, size)
    # F.interpolate computes the size from the scale itself and refuses 0; the operator below takes both.
    smaller: Tensor = torch.ops.aten.upsample_bilinear2d(x, size, False, scale, scale)
    return smaller


def enlarge(x: Tensor, grid: Size) -> Tensor:
    """(B, c, h, w) -> (B, c, H, W), bilinear, corners not aligned."""
    return F.interpolate(x, size=grid, mode="bilinear", align_corners=False)


def gate(x: Tensor, kind: str) -> Tensor:
    """(B, c, h, w) -> (B, c / 2, h, w): the first half of the channels times a function of the second.

    Products of two float16 halves leave float16's range, so they are formed and returned in float32.
    """
    x = x.float() if x.dtype == torch.float16 else x
    if kind == "sigmoid":
        return F.glu(x, dim=1)
    a, b = x.chunk(2, dim=1)
    return _gated(a, b, kind)


def context(x: Tensor, kind: str) -> Tensor:
    """(B, c, H, W) -> (B, c / 2, H, W): the gate, with its own mean over the image as the first half.

    Linear attention with one number per channel for its state: what the first half holds where the second
    lets it pass is averaged, and handed to each token as far as its own second half lets it pass. float32
    for float16, as `gate`.
    """
    x = x.float() if x.dtype == torch.float16 else x
    mean, b = gate(x, kind).mean(dim=(2, 3), keepdim=True), x.chunk(2, dim=1)[1]
    return mean * torch.sigmoid(b) if kind == "sigmoid" else _gated(mean, b, kind)


def _gated(a: Tensor, b: Tensor, kind: str) -> Tensor:
    channels = 2 * b.shape[1]
    factor = math.sqrt(channels / 2) if kind == "simple" else 1 / math.sqrt(channels)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return a * (b * factor)
    return torch.addcmul(b.new_zeros(()), a, b, value=factor)  # in one pass


def merge(stages: Sequence[Tensor], kind: str) -> Tensor:
    """Joins the stages' (B, c, H, W): on channels ("concat") or by addition ("sum", formula 3)."""
    if len(stages) == 1:
        return stages[0]
    return torch.cat(tuple(stages), dim=1) if kind == "concat" else sum(stages[1:], start=stages[0])
