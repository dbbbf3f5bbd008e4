"""What several processes that train the same mixers exchange."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Processes(Protocol):
    """Each of them takes its own part of every batch, and all do the same with what they have in common.

    All its methods are called by every process, in the same order.
    """

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Gives each tensor the values that it has in the first process."""
        ...

    def mean(self, tensors: Sequence[Tensor]) -> None:
        """Gives each tensor its mean over all processes."""
        ...

    def check_same(self, value: str) -> None:
        """Raises a DeltaConvError in all of them unless all have the same value."""
        ...
