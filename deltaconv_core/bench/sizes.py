"""Sizes of pictures, as users write them."""

from __future__ import annotations

import re

from ..errors import DeltaConvError

LATENT = 8  # pixels along a side of one latent position


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) in pixels from "768" or "1024x576".

    Raises:
        DeltaConvError: anything else, or sides that are not multiples of 16.
    """
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    width, height = (int(side) for side in (match[1], match[2] or match[1])) if match else (0, 0)
    if width < 16 or height < 16 or width % 16 or height % 16:
        raise DeltaConvError(
            f"expected a size such as 768 or 1024x576 (width x height), sides multiples of 16, got {text!r}"
        )
    return width, height


def latent_of(size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of the latent of a picture of (width, height) pixels."""
    return size[1] // LATENT, size[0] // LATENT
