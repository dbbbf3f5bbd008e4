"""Which queries are looked at: all of them, or a random sample of very many."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT_LIMIT = 16_384  # tokens up to which every query is looked at (1024 x 1024 pixels in Stable Diffusion)
SAMPLE = 1024  # queries looked at beyond that


def choose_queries(
    tokens: int, exact_limit: int = EXACT_LIMIT, sample: int = SAMPLE, seed: int = 0
) -> Tensor:
    """Indices of the queries to look at, (Q,) long, rising.

    Args:
        tokens: N.
        exact_limit: up to so many tokens, all of them.
        sample: beyond that, so many (or all there are), drawn without repetition.
        seed: of the draw.
    """
    if tokens <= max(exact_limit, sample):
        return torch.arange(tokens)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    return order[:sample].sort().values


def mean_and_error(total: Tensor, squares: Tensor, seen: int, population: int) -> tuple[Tensor, Tensor]:
    """Mean over the queries, and its standard error from having looked at some of them only.

    Sampling without repetition: s / sqrt(n) * sqrt(1 - n / N), which is zero when all were looked at.

    Args:
        total, squares: sums over the n queries, of the values and of their squares (float64).
        seen: n.
        population: N.
    """
    mean = total / seen
    if seen >= population:
        return mean, torch.zeros_like(mean)
    variance = (squares / seen - mean.square()).clamp(min=0) * seen / max(1, seen - 1)
    return mean, (variance / seen * (1 - seen / population)).sqrt()
