"""Where the image is among the tokens of a joint attention, and what a mask says of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...errors import DeltaConvError


@dataclass(frozen=True)
class JointLayout:
    """The place of the image among queries and keys: the same in both, row by row, without a gap.

    All other tokens are exact: text, padding, reference images, and keys that have no query at all.

    Args:
        grid: (H, W) of the image.
        start: number of the image's first query, and of its first key.

    Raises:
        DeltaConvError: a grid or a place that cannot be.
    """

    grid: tuple[int, int]
    start: int = 0

    def __post_init__(self) -> None:
        if min(self.grid) < 1 or self.start < 0:
            raise DeltaConvError(
                f"expected an image of at least 1 x 1 tokens after 0 or more others, got {self.grid[0]} x "
                f"{self.grid[1]} after {self.start}"
            )

    @property
    def tokens(self) -> int:
        """H * W."""
        return self.grid[0] * self.grid[1]

    @property
    def image(self) -> slice:
        """The image's queries, and its keys."""
        return slice(self.start, self.start + self.tokens)


def four_dimensional(mask: Tensor) -> Tensor:
    """A mask (N, M), (B, N, M) or (B, heads, N, M), N and heads also 1, as PyTorch's attention takes it."""
    if mask.ndim == 4:
        return mask
    return mask[None, None] if mask.ndim == 2 else mask[:, None]


def refusal_of_mask(mask: Tensor | None, layout: JointLayout) -> str:
    """Why landmarks cannot stand in for the image's keys under this mask; empty where they can.

    A mask of the keys alone is no obstacle, nor one that says other things of the exact keys to each query.
    But to one query all of the image must be shown alike, since a landmark is shown whole. Reading a mask of
    queries and keys waits for the GPU.

    Args:
        mask: bool, True where a key counts, or floating point, added to the scores; None: none.
        layout: of the attention.
    """
    if mask is None:
        return ""
    mask = four_dimensional(mask)
    if mask.shape[2] == 1:
        return "" if mask.shape[1] == 1 else "its mask differs between heads"
    among = mask[:, :, layout.image, layout.image]
    if bool((among == among[..., :1]).all()):
        return ""
    return "its mask shows some of the image's queries only parts of the image"
