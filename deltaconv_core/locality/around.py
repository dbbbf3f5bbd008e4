"""The average map around the query: all maps laid over each other with their queries in the middle."""

from __future__ import annotations

import torch
from torch import Tensor


class AroundQuery:
    """Sums maps of an H x W grid by the offset of the key from its query.

    Attributes:
        total: (2H - 1, 2W - 1) float32; offset (0, 0) is in the middle.
        count: likewise, how many queries have a key there, inside the picture.
    """

    def __init__(self, grid: tuple[int, int], device: torch.device | str | None = None) -> None:
        self.grid = grid
        shape = (2 * grid[0] - 1, 2 * grid[1] - 1)
        self.total = torch.zeros(shape, device=device)
        self.count = torch.zeros(shape, device=device)

    def add(self, maps: Tensor, rows: list[int], columns: list[int]) -> None:
        """Adds (Q, H, W) maps of queries that are at these places."""
        height, width = self.grid
        for one, y, x in zip(maps, rows, columns, strict=True):
            place = slice(height - 1 - y, 2 * height - 1 - y), slice(width - 1 - x, 2 * width - 1 - x)
            self.total[place] += one
            self.count[place] += 1
