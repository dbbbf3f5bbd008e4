"""AdamW, plain or in 8 bits, and the moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import DeltaConvError
from .settings import Settings


def make_optimizer(parameters: Iterable[Tensor], settings: Settings) -> torch.optim.Optimizer:
    """AdamW, or its 8-bit form.

    Raises:
        DeltaConvError: bitsandbytes is wanted and not installed.
    """
    arguments: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **arguments)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise DeltaConvError(
            f"the optimizer adamw8bit needs the package bitsandbytes ({error}): pip install bitsandbytes, or "
            "choose adamw"
        ) from error
    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, **arguments)
    return optimizer


class Average:
    """Exponential moving average of the mixers' weights.

    The first steps weigh more, min(decay, (1 + n) / (10 + n)), so that the start is soon forgotten.

    Args:
        weights: name -> parameter, followed by `update`.
        decay: share that the average keeps at each step; 0: the average is the last weights.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.weights = weights
        self.values = {name: w.detach().clone() for name, w in weights.items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after a step, counted from 0."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, value in self.values.items():
            value.lerp_(self.weights[name].detach(), share)

    @torch.no_grad()
    def hand_over(self) -> None:
        """Writes the average into the weights."""
        for name, value in self.values.items():
            self.weights[name].copy_(value)
