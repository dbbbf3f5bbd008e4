"""Sizes that pictures are cut to: many shapes with nearly the same number of pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...errors import DeltaConvError

PictureSize = tuple[int, int]
"""(height, width) in pixels."""


def make_buckets(resolution: int, step: int, max_ratio: float) -> list[PictureSize]:
    """Every size of at most resolution² pixels that is as large as its width allows, and the square.

    Args:
        resolution: side in pixels of a square.
        step: height and width are multiples of it.
        max_ratio: of the longer side to the shorter.

    Raises:
        DeltaConvError: a resolution without any size.
    """
    side = resolution // step * step
    if side < step:
        raise DeltaConvError(
            f"expected a resolution of at least {step} pixels, of which this teacher's sizes are multiples, "
            f"got {resolution}"
        )
    found = {(side, side)}
    for width in range(step, int(resolution * math.sqrt(max_ratio)) + 1, step):
        height = resolution**2 // width // step * step
        if height and max(width, height) <= max_ratio * min(width, height):
            found |= {(height, width), (width, height)}
    return sorted(found)


def nearest(size: PictureSize, buckets: Sequence[PictureSize]) -> PictureSize:
    """The bucket whose shape is nearest to a picture's; of those, the one with the most pixels."""
    ratio = math.log(size[1] / size[0])
    return min(buckets, key=lambda one: (abs(math.log(one[1] / one[0]) - ratio), -one[0] * one[1]))


def corner(size: PictureSize, bucket: PictureSize) -> tuple[PictureSize, PictureSize]:
    """How a picture becomes one of its bucket's size: it is scaled to cover that, and the middle cut out.

    Returns:
        (height, width) that it is scaled to, and (top, left) of the part that is cut out.
    """
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    height, width = (max(b, round(s * scale)) for s, b in zip(size, bucket, strict=True))
    return (height, width), ((height - bucket[0]) // 2, (width - bucket[1]) // 2)


def fit(picture: Any, bucket: PictureSize) -> Any:
    """A PIL picture at its bucket's size."""
    from PIL import Image

    (height, width), (top, left) = corner((picture.height, picture.width), bucket)
    scaled = picture.resize((width, height), Image.Resampling.LANCZOS)
    return scaled.crop((left, top, left + bucket[1], top + bucket[0]))
