"""One softmax over the tokens around each query and over landmarks for all the others.

As in CLEAR (arXiv 2412.16112), except that what is in the window is taken out of its cell's weight, so that
nothing counts twice: a window that covers the picture is attention. Queries are taken in tiles, whose keys
are those of the tile and half a window around it, behind a mask. One row of tiles is answered at a time, so
that its keys, values and scores are all that exists beyond q, k, v and the landmarks; on a CPU, whose caches
are small, one tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..neighborhood import TILE, near
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
        values: (B, heads, E + P, d or more) of the same; the picture's tokens have zeros beyond d.
        added: (B or 1, heads or 1, H * W or 1, E + 1) to the scores of the other tokens, and to all of the
            picture's, `HIDDEN` at least; None: nothing.

    Returns:
        (B, heads, H * W, width of the values). Landmarks' weights have q's dtype: in bfloat16, those of some
        hundred tokens are up to 1.6 % off.
    """
    batch, d, (height, width), radius = len(q), q.shape[3], cells.grid, window // 2
    q, k, v = (t.reshape(*t.shape[:2], height, width, d) for t in (q, k, v))
    sizes = cells.sizes.expand(batch, -1)
    weights = torch.ones_like(sizes[:, :1]) if cells.weights is None else cells.weights
    weights = weights.expand(batch, height * width).reshape(batch, 1, height, width, 1)
    own = cells.own().expand(batch, -1).reshape(batch, 1, height, width, 1)
    added = sizes.new_zeros(1, 1, 1, 1) if added is None else added
    added = added.expand(batch, -1, height * width, -1)
    added = added.reshape(*added.shape[:2], height, width, -1)
    high, wide = tile_side(height), tile_side(width)
    key_high, key_wide = min(high + window - 1, height), min(wide + window - 1, width)
    # At the border tiles and their keys are moved inside the picture, so that all have as many.
    columns = [min(first, width - wide) for first in range(0, width, wide)]
    key_columns = [min(max(first - radius, 0), width - key_wide) for first in columns]
    beside = torch.stack(
        [
            near(slice(first, first + wide), slice(key, key + key_wide), radius, q.device)
            for first, key in zip(columns, key_columns, strict=True)
        ]
    )  # (tiles, queries, keys)
    # Queries and keys as wide as the values: PyTorch's fast kernels ask for that.
    wider = values.shape[3] - d
    keys = F.pad(keys, (0, wider))

    together = tiles_at_once(q.device, len(columns))

    def answers(first: int, tile: int) -> Tensor:
        """(B, heads, rows, columns, width of the values) of some tiles, from this row and this tile on."""
        own_columns, own_key_columns = (of[tile : tile + together] for of in (columns, key_columns))
        count = len(own_columns)
        first_key = min(max(first - radius, 0), height - key_high)
        rows, key_rows = slice(first, first + high), slice(first_key, first_key + key_high)
        above = near(rows, key_rows, radius, q.device)
        window_of = above[:, None, :, None] & beside[tile : tile + count, None, :, None]
        window_of = window_of.flatten(3).flatten(1, 2)
        weight, cell, own_keys, own_values = (
            _tiles(t[:, :, key_rows], own_key_columns, key_wide) for t in (weights, own, k, v)
        )
        seen = window_of.repeat(batch, 1, 1) * weight[:, 0].mT  # (B * tiles, queries, keys)
        outside = outside_of(sizes.repeat_interleave(count, dim=0), cell[:, 0].mT, seen)
        bias = window_bias(seen, outside, _tiles(added[:, :, rows], own_columns, wide))
        own_keys, own_values = (
            F.pad(by_query_head(t, q.shape[1]), (0, wider)) for t in (own_keys, own_values)
        )
        y = F.scaled_dot_product_attention(
            F.pad(_tiles(q[:, :, rows], own_columns, wide), (0, wider)),
            _with_others(own_keys, keys),
            _with_others(own_values, values),
            attn_mask=bias.to(q.dtype),
            scale=d**-0.5,
        )
        tiles = y.reshape(batch, count, y.shape[1], high, wide, y.shape[3]).unbind(1)
        return torch.cat(
            [t[:, :, :, n * wide - columns[n] :] for n, t in enumerate(tiles, start=tile)], dim=3
        )

    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (q, keys, values, k, v))
    # Keys and values of all tiles are many times the picture's own: not kept for gradients.
    answered: Callable[[int, int], Tensor] = (
        partial(checkpoint, answers, use_reentrant=False) if learns else answers
    )
    parts = []
    for first in range(0, height, high):
        start = min(first, height - high)
        row = [answered(start, tile) for tile in range(0, len(columns), together)]
        parts.append(torch.cat(row, dim=3)[:, :, first - start :])
    return torch.cat(parts, dim=2).flatten(2, 3)


def tile_side(size: int) -> int:
    """Of the tiles along an axis, as alike as they can be: `TILE` at most."""
    return -(-size // -(-size // TILE))


def tiles_at_once(device: torch.device, row: int) -> int:
    """Of a row of so many. Compiled code is short where they are many."""
    return 1 if device.type == "cpu" and not torch.compiler.is_compiling() else row


def _tiles(image: Tensor, columns: Sequence[int], wide: int) -> Tensor:
    """(B, heads, rows, W, d) -> (B * tiles, heads, rows * wide, d)."""
    tiles = torch.stack([image[:, :, :, first : first + wide] for first in columns], dim=1)
    return tiles.flatten(3, 4).flatten(0, 1)


def _with_others(own: Tensor, others: Tensor) -> Tensor:
    """(B * tiles, heads, n, d) of tiles, and after them (B, heads, m, d) of every query's: one copy."""
    own = own.reshape(len(others), -1, *own.shape[1:])
    both = torch.cat([own, others[:, None].expand(-1, own.shape[1], -1, -1, -1)], dim=3)
    return both.flatten(0, 1)


def outside_of(sizes: Tensor, cell: Tensor, seen: Tensor) -> Tensor:
    """The weights that n queries' landmarks have without what is seen one by one: (B, n, P).

    Args:
        sizes: (B, P) of the cells.
        cell: (B, n or 1, keys) the cell of each key.
        seen: (B, n, keys) weights; zero for what is not seen.
    """
    inside = seen.new_zeros(*seen.shape[:2], sizes.shape[1]).scatter_add(2, cell.expand_as(seen), seen)
    left = sizes[:, None] - inside
    return torch.where(left > ROUNDING * sizes[:, None], left, 0)


def window_bias(seen: Tensor, outside: Tensor, added: Tensor) -> Tensor:
    """What is added to the scores of tokens in the window, of others, and of landmarks, in this order.

    Args:
        seen: (B, n, keys) the weights of tokens around n queries; zero for those outside the window.
        outside: (B, n, P) the weights of the landmarks.
        added: (B or 1, heads or 1, n or 1, E + 1), as `windowed_attention` says.

    Returns:
        (B, heads or 1, n, keys + E + P).
    """
    others, image = added[..., :-1], added[..., -1:]
    around, far = (weight.log().clamp(min=HIDDEN)[:, None] + image for weight in (seen, outside))
    return torch.cat([around, others.expand(*around.shape[:3], -1), far], dim=3)


def by_query_head(tokens: Tensor, heads: int) -> Tensor:
    """Heads of keys or values (B, key heads, N, d) as many times as there are heads of queries for each."""
    repeats = heads // tokens.shape[1]
    return tokens if repeats == 1 else tokens.repeat_interleave(repeats, dim=1)
