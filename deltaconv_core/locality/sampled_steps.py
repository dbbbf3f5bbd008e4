"""At which steps of a sampling to look."""

from __future__ import annotations

from ..errors import DeltaConvError


def spread(steps: int, looks: int) -> list[int]:
    """Indices of the steps to look at, in the middle of as many equal parts of the sampling.

    Args:
        steps: of the sampling.
        looks: how many of them; all when there are no more.

    Raises:
        DeltaConvError: less than one of either.
    """
    if steps < 1 or looks < 1:
        raise DeltaConvError(f"expected at least one step and one look, got {steps} steps and {looks} looks")
    looks = min(looks, steps)
    return [int((i + 0.5) * steps / looks) for i in range(looks)]
