"""Synthetic attention whose locality is known."""

from __future__ import annotations

import torch

from deltaconv_core.locality import LayerLocality, LayerStatistics


def places(grid: tuple[int, int]) -> torch.Tensor:
    """(N, 2) row and column of every token."""
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return torch.stack([y.flatten(), x.flatten()], dim=1)


def gaussian(grid: tuple[int, int], width: float, shift: tuple[int, int] = (0, 0)) -> torch.Tensor:
    """(N, N): every query looks at the neighborhood of the token that lies `shift` away from it."""
    at = places(grid).double()
    squares = (at[:, None] + torch.tensor(shift) - at[None]).square().sum(dim=2)
    return (-squares / (2 * width**2)).softmax(dim=1)


def uniform(grid: tuple[int, int]) -> torch.Tensor:
    n = grid[0] * grid[1]
    return torch.full((n, n), 1 / n).double()


def sink(grid: tuple[int, int], token: int) -> torch.Tensor:
    """(N, N): every query looks at one token."""
    n = grid[0] * grid[1]
    return torch.eye(n).double()[token].expand(n, n)


def q_and_k(*heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, heads, N, N) each, whose attention is the given one."""
    maps = torch.stack(heads).clamp(min=1e-30)
    n = maps.shape[-1]
    q = torch.eye(n).expand(len(heads), n, n) * n**0.5
    return q[None], maps.log().transpose(1, 2).float()[None]


def locality(grid: tuple[int, int], *heads: torch.Tensor, **settings) -> LayerLocality:
    """The statistics of one call of the attention."""
    statistics = LayerStatistics("site", 64, **settings)
    statistics.add(*q_and_k(*heads), grid)
    return statistics.result()
