"""Neighborhood attention: every query sees the keys of a K x K window around it, and nothing else.

With it in place of self-attention one sees, without training anything, what locality alone costs (the paper's
ablation in section 3, K = 13).

The window is centered on the query and ends at the border of the picture: keys outside do not exist, so a
query in a corner sees (K + 1)² / 4 of them. (NATTEN, the package known for this, shifts the window back into
the picture instead, so that every query sees K² keys. That is another attention wherever the border is near;
it cannot stand in for this one.)

Queries are taken in tiles; a tile's keys are those of the tile and K // 2 around it, and a mask picks each
query's own. The mask and the scores of one tile are all that exists beyond q, k and v.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import DeltaConvError

TILE = 16  # queries along each side of a tile


def neighborhood_attention(
    q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], kernel_size: int
) -> Tensor:
    """Scaled dot-product attention in a K x K window.

    Args:
        q, k, v: (B, heads, H * W, d), row by row.
        grid: (H, W).
        kernel_size: K, odd.

    Returns:
        (B, heads, H * W, d).

    Raises:
        DeltaConvError: tokens that do not fit the grid, or an even kernel size.
    """
    height, width = grid
    if not (q.shape[2] == k.shape[2] == v.shape[2] == height * width):
        raise DeltaConvError(
            f"expected {height} x {width} = {height * width} queries, keys and values, got {q.shape[2]}, "
            f"{k.shape[2]} and {v.shape[2]}"
        )
    check_kernel_size(kernel_size)
    radius = kernel_size // 2
    if radius >= max(grid) - 1:
        return F.scaled_dot_product_attention(q, k, v)
    q, k, v = (t.reshape(*t.shape[:2], height, width, t.shape[3]) for t in (q, k, v))
    out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
    for rows, key_rows in tiles(height, radius):
        for columns, key_columns in tiles(width, radius):
            above = near(rows, key_rows, radius, q.device)
            beside = near(columns, key_columns, radius, q.device)
            mask = above[:, None, :, None] & beside[:, None]
            out[:, :, rows, columns] = _attend(
                q[:, :, rows, columns], k[:, :, key_rows, key_columns], v[:, :, key_rows, key_columns], mask
            )
    return out.flatten(2, 3)


def check_kernel_size(kernel_size: int) -> None:
    """Refuses a window that has no middle.

    Raises:
        DeltaConvError: an even kernel size, or one below 1.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise DeltaConvError(f"expected an odd kernel_size of at least 1, got {kernel_size}")


def tiles(size: int, radius: int) -> Iterator[tuple[slice, slice]]:
    """Along one axis: the queries of each tile, and the keys that they may see."""
    for start in range(0, size, TILE):
        stop = min(size, start + TILE)
        yield slice(start, stop), slice(max(0, start - radius), min(size, stop + radius))


def near(queries: slice, keys: slice, radius: int, device: torch.device) -> Tensor:
    """(queries, keys) bool: whether they are within the radius, along one axis."""
    at, other = (torch.arange(s.start, s.stop, device=device) for s in (queries, keys))
    distance = at[:, None] - other
    return distance.abs() <= radius


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One tile: q (B, heads, h, w, d), k and v (B, heads, h', w', d), mask (h, w, h', w')."""
    flat = mask.flatten(2).flatten(0, 1)
    out = F.scaled_dot_product_attention(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3), attn_mask=flat)
    return out.reshape(*q.shape[:-1], v.shape[-1])
