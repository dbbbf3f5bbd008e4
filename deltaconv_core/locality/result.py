"""What is known about the attention of one layer after looking at it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .components import TwoComponents

THRESHOLD = 0.8  # of the high-frequency part, for the effective receptive field (paper section 3)


@dataclass(frozen=True, eq=False)
class LayerLocality:
    """Locality of one layer, averaged over queries, heads and timesteps.

    Curves are (R,) float64 tensors; entry r belongs to the window of K = 2r + 1 tokens.

    Args:
        site: diffusers module path of the attention.
        channels: of its tokens.
        grid: (H, W) of its tokens.
        heads: number of heads.
        queries: how many queries were looked at, per map and timestep.
        mass: attention score mass ASM(K).
        mass_error: its standard error from looking at a sample of the queries; zero when all were looked at.
        mass_by_head: (heads, R).
        high: the same of the high-frequency part, as a share of all of it.
        high_error: its standard error.
        high_without_sinks: `high` without what the first and the last token receive from others.
        high_share: the high-frequency part as a share of all attention.
        first, last: share of the attention on the first and on the last token.
        outside: share of the attention on tokens that are not of the image.
        around: (2H - 1, 2W - 1) average map around the query, which is in the middle.
        components: the fit to `around`.
        by_moment: `high` at each timestep that was looked at.
    """

    site: str
    channels: int
    grid: tuple[int, int]
    heads: int
    queries: int
    mass: Tensor
    mass_error: Tensor
    mass_by_head: Tensor
    high: Tensor
    high_error: Tensor
    high_without_sinks: Tensor
    high_share: float
    first: float
    last: float
    outside: float
    around: Tensor
    components: TwoComponents
    by_moment: Mapping[str, Tensor]

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def exact(self) -> bool:
        """Whether every query was looked at."""
        return self.queries == self.tokens

    @property
    def erf(self) -> int:
        """Effective receptive field (paper section 3)."""
        return receptive_field(self.high)

    @property
    def erf_without_sinks(self) -> int:
        return receptive_field(self.high_without_sinks)

    @property
    def erf_range(self) -> tuple[int, int]:
        """Its smallest and its largest value over the timesteps."""
        fields = [receptive_field(high) for high in self.by_moment.values()]
        return min(fields), max(fields)


def receptive_field(high: Tensor, threshold: float = THRESHOLD) -> int:
    """The smallest odd K whose window holds this share of the high-frequency part."""
    return 2 * int((high >= threshold).int().argmax()) + 1
