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

HIDDEN = -5000.0
"""In place of minus infinity: its exponential is 0 as well."""
ROUNDING = 1e-5  # a cell of which no larger part is outside the window is inside


def windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cells: Cells,
    window: int,
    keys: Tensor,
    values: Tensor,
    added: Tensor | None = None,
) -> Tensor:
    """Attention to the tokens around each query, to landmarks, and to what every query sees.

    Args:
        q: (B, heads, H * W, d) of the tokens.
        k, v: (B, key heads, H * W, d); key heads divide the heads.
        cells: what the landmarks are taken of.
        window: its side, odd.
        keys: (B, heads, E + P, d) of E other tokens, and of the landmarks.
        values: (B, heads, E + P, d or more) of the same. What they are wider than d, those of the picture's
            tokens have zeros for.
        added: (B or 1, heads or 1, H * W or 1, E + 1) to the scores of the other tokens, and to all of the
            picture's; None: nothing.

    Returns:
        (B, heads, H * W, width of the values).
    """
    grid, radius, heads, d = cells.grid, window // 2, q.shape[1], q.shape[3]
    q, k, v = (t.reshape(*t.shape[:2], *grid, d) for t in (q, k, v))
    own = cells.own().reshape(grid)
    weights = None if cells.weights is None else cells.weights.reshape(-1, *grid)
    if added is not None:
        added = added.expand(-1, -1, own.numel(), -1)
        added = added.reshape(*added.shape[:2], *grid, -1)
    # Queries and keys as wide as the values: PyTorch's fast kernels ask for that.
    wider = values.shape[3] - d
    keys = F.pad(keys, (0, wider))
    out = q.new_empty(*q.shape[:4], values.shape[3])
    for rows, key_rows in tiles(grid[0], radius):
        for columns, key_columns in tiles(grid[1], radius):
            above = near(rows, key_rows, radius, q.device)
            beside = near(columns, key_columns, radius, q.device)
            seen = (above[:, None, :, None] & beside[:, None]).flatten(2).flatten(0, 1)  # (queries, keys)
            some = seen.to(cells.sizes.dtype)[None]
            if weights is not None:
                some = some * weights[:, key_rows, key_columns].flatten(1)[:, None]
            part = F.one_hot(own[key_rows, key_columns].flatten(), cells.sizes.shape[1])  # (keys, P)
            outside = less(cells.sizes[:, None], some @ part.to(some.dtype))
            theirs = None if added is None else added[:, :, rows, columns].flatten(2, 3)
            tile = q[:, :, rows, columns]
            around, answers = (
                by_query_head(t[:, :, key_rows, key_columns].flatten(2, 3), heads) for t in (k, v)
            )
            y = F.scaled_dot_product_attention(
                F.pad(tile.flatten(2, 3), (0, wider)),
                torch.cat([F.pad(around, (0, wider)), keys], dim=2),
                torch.cat([F.pad(answers, (0, wider)), values], dim=2),
                attn_mask=window_bias(some, outside, theirs).to(q.dtype),
                scale=d**-0.5,
            )
            out[:, :, rows, columns] = y.reshape(*tile.shape[:4], -1)
    return out.flatten(2, 3)


def less(sizes: Tensor, seen: Tensor) -> Tensor:
    """The weight of each cell without that of its tokens that are seen one by one."""
    left = sizes - seen
    return torch.where(left > ROUNDING * sizes, left, 0)


def window_bias(seen: Tensor, outside: Tensor, added: Tensor | None) -> Tensor:
    """What is added to the scores of tokens in the window, of others, and of landmarks, in this order.

    Args:
        seen: (B or 1, n, keys) the weights of tokens around n queries; zero for those outside the window.
        outside: (B or 1, n, P) the weights of the landmarks.
        added: (B or 1, heads or 1, n, E + 1), as `windowed_attention` says.
    """
    around, far = (weights.log()[:, None] for weights in (seen, outside))
    parts = [around, far]
    if added is not None:
        others, image = added[..., :-1], added[..., -1:]
        parts = [around + image, others, far + image]
        shape = [max(sizes) for sizes in zip(*(part.shape[:3] for part in parts), strict=True)]
        parts = [part.expand(*shape, -1) for part in parts]
    return torch.cat(parts, dim=3).clamp(min=HIDDEN)


def by_query_head(tokens: Tensor, heads: int) -> Tensor:
    """Heads of keys or values (B, key heads, N, d) as many times as there are heads of queries for each."""
    repeats = heads // tokens.shape[1]
    return tokens if repeats == 1 else tokens.repeat_interleave(repeats, dim=1)
