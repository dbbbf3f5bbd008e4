"""The question a site answers on every call: its attention, or the mixer that stands in for it?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DeltaConvError

Choice = bool | Tensor
"""True: the mixer. False: the attention. A (B,) bool tensor: sample by sample."""


@dataclass(frozen=True)
class SamplingRange:
    """The part of the sampling in which the mixer runs, as fractions of the way from noise to picture.

    Raises:
        DeltaConvError: not 0 <= start < end <= 1.
    """

    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.start < self.end <= 1.0:
            raise DeltaConvError(
                "expected 0 <= start_percent < end_percent <= 1, got "
                f"start_percent={self.start}, end_percent={self.end}"
            )

    @property
    def is_everything(self) -> bool:
        return self.start == 0.0 and self.end == 1.0

    def choose(self, sigmas: Tensor, percent_to_sigma: Callable[[float], float]) -> Choice:
        """The answer for samples of these noise levels; both ends belong to the range.

        Args:
            sigmas: (B,) or a scalar.
            percent_to_sigma: the noise level at a fraction of the sampling.
        """
        highest, lowest = percent_to_sigma(self.start), percent_to_sigma(self.end)
        inside = [lowest <= sigma <= highest for sigma in sigmas.flatten().tolist()]
        if all(inside) or not any(inside):
            return bool(inside[0])
        return torch.tensor(inside, device=sigmas.device)


def answer(choice: Choice, mixer: Callable[[], Tensor], attention: Callable[[], Tensor]) -> Tensor:
    """What the site returns, (B, N, C). Only a choice sample by sample runs both."""
    if isinstance(choice, Tensor):
        return torch.where(choice.view(-1, 1, 1), mixer(), attention())
    return mixer() if choice else attention()
