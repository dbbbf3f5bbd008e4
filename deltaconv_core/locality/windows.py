"""Attention score mass: how much of a map lies in a K x K window around its query (paper section 3).

    ASM(i,j; K) = sum of A(i,j)(m,n) over max(|m - i|, |n - j|) < K / 2

K = 2r + 1 reaches r tokens to each side (an even K is the same window as K - 1). The window ends at the
border of the picture.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def window_mass(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The mass in every window, from a summed-area table.

    Args:
        maps: (..., Q, H, W), one map for each query.
        rows, columns: (Q,) long, where the queries are.

    Returns:
        (..., Q, R) with R = max(H, W): the mass within r = 0, 1, ..., R - 1; the last is the whole map.
    """
    height, width = maps.shape[-2:]
    table = F.pad(maps, (1, 0, 1, 0)).cumsum(dim=-1).cumsum(dim=-2).flatten(-2)
    radii = torch.arange(max(height, width), device=maps.device)
    top, left = ((at[:, None] - radii).clamp(min=0) for at in (rows, columns))
    bottom = (rows[:, None] + radii + 1).clamp(max=height)
    right = (columns[:, None] + radii + 1).clamp(max=width)

    def corner(y: Tensor, x: Tensor) -> Tensor:
        index = y * (width + 1) + x
        return table.gather(-1, index.expand(*table.shape[:-1], -1))

    return corner(bottom, right) - corner(top, right) - corner(bottom, left) + corner(top, left)
