"""Landmarks: the picture divided into a fixed number of rectangles, each represented by its mean.

The cells do not overlap and leave nothing out, so where all keys of every cell are equal, softmax over the
landmarks with the logarithm of the cells' sizes added is the attention itself, on odd sizes too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

Grid = tuple[int, int]


def cells_of(grid: Grid, landmarks: int) -> Grid:
    """(rows, columns) of the cells, rows * columns <= landmarks, about as high as wide; never more than the
    grid has."""
    height, width = grid
    rows = min(max(1, round(math.sqrt(landmarks * height / width))), height, landmarks)
    return rows, min(max(1, landmarks // rows), width)


def edges(size: int, parts: int) -> list[int]:
    """Part i of an axis is [edges[i], edges[i + 1])."""
    return [i * size // parts for i in range(parts + 1)]


def key_weights(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """(B, N) weights in [0, 1] of the keys, such that softmax weighs each key with it.

    Args:
        mask: (B, N) bool, True where a key counts, or floating point, added to the logits.
        like: the weights are in its dtype, float32 at least.
    """
    if mask is None:
        return None
    dtype = torch.promote_types(like.dtype, torch.float32)
    if mask.dtype == torch.bool:
        return mask.to(dtype)
    mask = mask.to(dtype)
    return (mask - mask.amax(dim=1, keepdim=True)).exp()


@dataclass(frozen=True, eq=False)
class Cells:
    """The cells of one picture.

    Args:
        grid: (H, W) of the tokens.
        shape: (rows, columns) of the cells.
        weights: (B, N) of the tokens; None: all alike.
        sizes: (1 or B, P) tokens in each cell, or sums of their weights.
    """

    grid: Grid
    shape: Grid
    weights: Tensor | None
    sizes: Tensor

    @classmethod
    def of(cls, grid: Grid, landmarks: int, weights: Tensor | None, like: Tensor) -> Cells:
        """At most so many cells; their sizes on like's device, float32 at least."""
        shape = cells_of(grid, landmarks)
        if weights is not None:
            return cls(grid, shape, weights, _sums(weights[:, None, :, None], grid, shape)[:, 0, :, 0])
        dtype = torch.promote_types(like.dtype, torch.float32)
        if _alike(grid, shape):
            size = grid[0] * grid[1] / (shape[0] * shape[1])
            sizes = torch.full((1, shape[0] * shape[1]), size, device=like.device, dtype=dtype)
        else:
            heights, widths = (ends.diff() for ends in _edges(grid, shape, like.device))
            sizes = (heights[:, None] * widths).flatten()[None].to(dtype)
        return cls(grid, shape, None, sizes)

    @property
    def are_tokens(self) -> bool:
        """Whether each cell is one token."""
        return self.shape == self.grid

    def means(self, tokens: Tensor) -> Tensor:
        """(B, heads, H * W, d) -> (B, heads, P, d), float32 at least; of a cell without weight, zero."""
        sizes = self.sizes
        if self.weights is not None:
            tokens = tokens * self.weights[:, None, :, None]
            sizes = sizes.clamp(min=torch.finfo(sizes.dtype).tiny)
        return _sums(tokens, self.grid, self.shape) / sizes[:, None, :, None]

    def bias(self) -> Tensor | None:
        """(1 or B, 1, 1, P) that is added to the logits of the landmarks: log n; None where all are alike."""
        if self.weights is None and _alike(self.grid, self.shape):
            return None
        return self.sizes.log()[:, None, None, :]

    def own(self) -> Tensor:
        """(N,) the number of each token's cell."""
        row, column = (
            torch.bucketize(torch.arange(size, device=self.sizes.device), ends[1:-1], right=True)
            for size, ends in zip(self.grid, _edges(self.grid, self.shape, self.sizes.device), strict=True)
        )
        return (row[:, None] * self.shape[1] + column).flatten()


def _alike(grid: Grid, shape: Grid) -> bool:
    """Whether all cells have the same number of tokens."""
    return grid[0] % shape[0] == 0 and grid[1] % shape[1] == 0


def _edges(grid: Grid, shape: Grid, device: torch.device) -> list[Tensor]:
    """`edges` of both axes on a device, without a copy from the CPU."""
    return [
        torch.arange(parts + 1, device=device) * size // parts
        for size, parts in zip(grid, shape, strict=True)
    ]


def _sums(tokens: Tensor, grid: Grid, shape: Grid) -> Tensor:
    """(B, heads, H * W, d) -> (B, heads, P, d), summed over each cell, in float32 at least."""
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    (height, width), (rows, columns) = grid, shape
    first, d = tokens.shape[:2], tokens.shape[3]
    if _alike(grid, shape):
        parts = tokens.reshape(*first, rows, height // rows, columns, width // columns, d)
        return parts.sum(dim=(3, 5), dtype=dtype).flatten(2, 3)
    image = _sums_along(tokens.reshape(*first, *grid, d), 2, rows, dtype)
    return _sums_along(image, 3, columns, dtype).flatten(2, 3)


def _sums_along(image: Tensor, dim: int, parts: int, dtype: torch.dtype) -> Tensor:
    """Sums over each part of a dimension. What `edges` says recurs after a part of it: all at once."""
    size = image.shape[dim]
    times = math.gcd(size, parts)
    image = image.reshape(*image.shape[:dim], times, size // times, *image.shape[dim + 1 :])
    sums = [
        image.narrow(dim + 1, a, b - a).sum(dim=dim + 1, dtype=dtype)
        for a, b in pairwise(edges(size // times, parts // times))
    ]
    return torch.stack(sums, dim=dim + 1).flatten(dim, dim + 1)
