"""Attention as two components: one that decays with the distance from the query, and a constant.

That is what a ΔConvBlock is made of: convolutions for the first, a global mean for the second (paper sections
3 and 4). The residual says how much of the average map is neither.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

POWERS = (1, 2)
LENGTHS = 96  # tried, from a fifth of a token to twice the picture and more


@dataclass(frozen=True)
class TwoComponents:
    """a * exp(-(distance / length)^power) + c, fitted to an average map around the query.

    Args:
        local: share of the attention in the decaying component.
        constant: share of the attention in the constant.
        length: in tokens.
        power: 1 exponential, 2 Gaussian; whichever fits better.
        residual: squared error of the fit as a part of the map's variance: 0 perfect, 1 no better than a
            constant.
    """

    local: float
    constant: float
    length: float
    power: int
    residual: float


def fit_components(mean: Tensor, count: Tensor, queries: float) -> TwoComponents:
    """Least squares over all pairs of a query and a key, with neither component negative.

    Args:
        mean: (2H - 1, 2W - 1) average attention by offset, the query in the middle.
        count: likewise, the number of pairs with that offset.
        queries: how many queries there are.
    """
    mean, count = mean.cpu().double(), count.cpu().double()
    height, width = mean.shape
    y, x = torch.arange(height) - height // 2, torch.arange(width) - width // 2
    distance = torch.hypot(y[:, None].double(), x[None, :].double())
    weight = count / count.sum()
    average = (weight * mean).sum()
    variance = (weight * (mean - average).square()).sum()
    per_query = count.sum() / queries
    constant = float(average * per_query)
    if variance <= 1e-10 * average.square():
        return TwoComponents(0.0, constant, 0.0, 1, residual=0.0)
    best, error = TwoComponents(0.0, constant, 0.0, 1, residual=1.0), variance
    for length in torch.logspace(-0.7, math.log10(2 * max(height, width)), LENGTHS).tolist():
        for power in POWERS:
            decay = (-((distance / length) ** power)).exp()
            a, c = _amplitudes(decay, mean, weight)
            now = (weight * (a * decay + c - mean).square()).sum()
            if now < error:
                error = now
                local = a * (weight * decay).sum() * per_query
                best = TwoComponents(
                    float(local), float(c * per_query), length, power, float(error / variance)
                )
    return best


def _amplitudes(decay: Tensor, mean: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The best a and c >= 0 of a * decay + c."""
    d, m = (weight * decay).sum(), (weight * mean).sum()
    dd, dm = (weight * decay.square()).sum(), (weight * decay * mean).sum()
    a = (dm - d * m) / (dd - d * d).clamp(min=1e-300)
    c = m - a * d
    if a < 0:
        return torch.zeros_like(a), m
    if c < 0:
        return dm / dd, torch.zeros_like(c)
    return a, c
