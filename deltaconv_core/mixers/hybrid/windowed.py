"""One softmax over the tokens around each query and over landmarks for all the others.

As in CLEAR (arXiv 2412.16112), except that what is in the window is taken out of its cell's weight, so that
nothing counts twice: a window that covers the picture is attention. Queries are taken in tiles, as
`mixers.neighborhood` does; one tile's scores are all that exists beyond q, k, v and the landmarks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..neighborhood import near, tiles
from .cells import Cells

ROUNDING = 1e-5  # a cell of which no larger part is outside the window is inside


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, cells: Cells, window: int) -> Tensor:
    """(B, heads, H * W, d) each -> (B, heads, H * W, d).

    Args:
        q, k, v: of the tokens.
        cells: what the landmarks are taken of.
        window: its side, odd.
    """
    grid, radius = cells.grid, window // 2
    keys, values = (cells.means(t).to(t.dtype) for t in (k, v))
    q, k, v = (t.reshape(*t.shape[:2], *grid, t.shape[3]) for t in (q, k, v))
    member = cells.membership().reshape(*grid, -1)  # (H, W, P)
    weights = None if cells.weights is None else cells.weights.reshape(-1, *grid)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for rows, key_rows in tiles(grid[0], radius):
        for columns, key_columns in tiles(grid[1], radius):
            above = near(rows, key_rows, radius, q.device)
            beside = near(columns, key_columns, radius, q.device)
            seen = (above[:, None, :, None] & beside[:, None]).flatten(2).flatten(0, 1)  # (queries, keys)
            part = member[key_rows, key_columns].flatten(0, 1)  # (keys, P)
            some = seen.to(part.dtype)[None]
            if weights is not None:
                some = some * weights[:, key_rows, key_columns].flatten(1)[:, None]
            left = cells.sizes[:, None] - some @ part
            left = torch.where(left > ROUNDING * cells.sizes[:, None], left, 0)
            bias = torch.cat([some, left], dim=2).log().to(q.dtype)[:, None]
            tile = q[:, :, rows, columns]
            y = F.scaled_dot_product_attention(
                tile.flatten(2, 3),
                torch.cat([k[:, :, key_rows, key_columns].flatten(2, 3), keys], dim=2),
                torch.cat([v[:, :, key_rows, key_columns].flatten(2, 3), values], dim=2),
                attn_mask=bias,
            )
            out[:, :, rows, columns] = y.reshape(tile.shape)
    return out.flatten(2, 3)
