"""Reads shape, colour, count, position, background and layout back off a picture.

Exact on the drawn pictures (tested), and independent of the prompt: every pixel goes to the nearest colour
that the drawings use, connected regions of an object colour are compared with each shape drawn into their
bounding box, and the layout is the first one whose far-apart parts agree.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import ndimage

from ..words import ANY, SLOTS, Prompt
from .drawings import ACCENTS, BACKGROUNDS, COLORS, shape_distance

_PALETTE = {**COLORS, **ACCENTS, **BACKGROUNDS}
_NAMES = list(_PALETTE)
_RGB = np.array(list(_PALETTE.values()), np.float64)

#: Mean absolute difference (0..255) between a picture and its mirror image below which it counts as
#: symmetric.
SYMMETRY_LIMIT = 12.0
#: Distance in RGB beyond which a pixel has none of the known colours (it blends two of them at an edge).
COLOR_LIMIT = 70.0
#: Smallest overlap (intersection over union) between a region and a drawn shape.
SHAPE_LIMIT = 0.6


class Reading(NamedTuple):
    """What the detector saw; ``prompt`` has :data:`~demo.words.ANY` where a slot could not be read."""

    prompt: Prompt
    symmetry: float  # mean absolute difference to the mirror image, 0..255

    def matches(self, prompt: Prompt) -> dict[str, bool]:
        """Which slots of ``prompt`` the picture fulfils; open slots always hold."""
        return {
            slot: wanted in (ANY, seen) for slot, wanted, seen in zip(SLOTS, prompt, self.prompt, strict=True)
        }


def read_picture(picture: np.ndarray) -> Reading:
    """Read a uint8 (S, S, 3) picture of the demo model, S >= 32."""
    distances = np.linalg.norm(picture[:, :, None, :].astype(np.float64) - _RGB, axis=-1)
    labels = np.where(distances.min(-1) < COLOR_LIMIT, np.argmin(distances, -1), -1)
    symmetry = float(np.abs(picture.astype(np.float64) - picture[:, ::-1]).mean())
    objects = {name: _objects(labels == _NAMES.index(name)) for name in COLORS}
    color = max(objects, key=lambda name: sum(region.area for region in objects[name]))
    found = objects[color]
    background = max(BACKGROUNDS, key=lambda name: int((labels == _NAMES.index(name)).sum()))
    layout = _layout(labels, found, labels == _NAMES.index(color), symmetry)
    if not found:
        return Reading(Prompt(background=background, layout=layout), symmetry)
    shapes = {region.shape for region in found}
    position, count = _arrangement(found, layout)
    prompt = Prompt(shapes.pop() if len(shapes) == 1 else ANY, color, count, position, background, layout)
    return Reading(prompt, symmetry)


class _Region(NamedTuple):
    shape: str
    area: int
    x: float  # centre, as a fraction of the picture's side from its middle
    y: float


def _objects(mask: np.ndarray) -> list[_Region]:
    """Connected regions of ``mask`` that are as big and as solid as an object, each with its shape."""
    size = mask.shape[0]
    regions, _ = ndimage.label(mask)
    found = []
    for index, box in enumerate(ndimage.find_objects(regions), start=1):
        region = regions[box] == index
        height, width = region.shape
        if min(height, width) < 0.11 * size or region.mean() < 0.35:
            continue
        x, y = (box[1].start + width / 2) / size - 0.5, (box[0].start + height / 2) / size - 0.5
        found.append(_Region(_shape_of(region), int(region.sum()), x, y))
    return found


#: Area, and height of the centroid below the centre, of a shape of radius 1.
_MOMENTS = {
    "circle": (np.pi, 0.0),
    "square": (4 * 0.87**2, 0.0),
    "triangle": (1.9, -1 + 1.9 * 2 / 3),
    "diamond": (2 * 1.15**2, 0.0),
    "cross": (8 * 0.34 - 4 * 0.34**2, 0.0),
}


def _shape_of(region: np.ndarray) -> str:
    """The shape that overlaps ``region`` most when drawn with the same area and centroid; ANY when none
    does."""
    ys, xs = np.nonzero(region)
    height, width = region.shape
    column, row = np.meshgrid(np.arange(-2, width + 2), np.arange(-2, height + 2))
    padded = np.pad(region, 2)
    overlaps = {}
    for shape, (area, drop) in _MOMENTS.items():
        radius = np.sqrt(len(ys) / area)
        drawn = shape_distance(shape, column - xs.mean(), row - ys.mean() + drop * radius, radius) < 0
        overlaps[shape] = float((drawn & padded).sum() / (drawn | padded).sum())
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return best if overlaps[best] >= SHAPE_LIMIT else ANY


def _arrangement(found: list[_Region], layout: str) -> tuple[str, str]:
    """Position and count words of the objects; mirrored columns are read as ``left``."""
    names = ("one", "two", "three")
    if layout == "mirror" and _mirrored_columns(found):
        return "left", names[len(found) // 2 - 1] if len(found) <= 6 else ANY
    dx, dy = (float(np.mean([getattr(region, axis) for region in found])) for axis in "xy")
    if max(abs(dx), abs(dy)) < 0.17:
        position = "center"
    elif abs(dx) > abs(dy):
        position = "left" if dx < 0 else "right"
    else:
        position = "top" if dy < 0 else "bottom"
    return position, names[len(found) - 1] if len(found) <= 3 else ANY


def _mirrored_columns(found: list[_Region]) -> bool:
    """True when the objects stand in two columns, a quarter of the side from the edges, at the same
    heights."""
    left, right = (sorted(r.y for r in found if (r.x < 0) is side) for side in (True, False))
    if len(left) != len(right) or any(not 0.21 < abs(region.x) < 0.29 for region in found):
        return False
    return max(abs(a - b) for a, b in zip(left, right, strict=True)) < 0.05


def _layout(labels: np.ndarray, found: list[_Region], objects: np.ndarray, symmetry: float) -> str:
    """Read the layout from the accents: which parts of the picture they cover, and whether these agree.

    Pixels at the objects' edges are left out: a blend of two colours can look like an accent.
    """
    size = len(labels)
    free = ~ndimage.binary_dilation(objects, iterations=2)
    counts = {name: int(((labels == _NAMES.index(name)) & free).sum()) for name in ACCENTS}
    accent = labels == _NAMES.index(max(counts, key=lambda name: counts[name]))
    symmetric = symmetry < SYMMETRY_LIMIT
    if found and symmetric and _mirrored_columns(found):
        return "mirror"
    if max(counts.values()) < 0.003 * size**2:
        return "plain"
    edge = max(1, round(0.03 * size))
    if all(
        strip.mean() > 0.9 for strip in (accent[:edge], accent[-edge:], accent[:, :edge], accent[:, -edge:])
    ):
        return "frame"
    if _striped(accent, free) or _striped(accent.T, free.T):
        return "stripes"
    corner = round(0.13 * size)
    marks = [
        accent[rows, columns].mean()
        for rows in (slice(corner), slice(-corner, None))
        for columns in (slice(corner), slice(-corner, None))
    ]
    for first, second in ((0, 3), (1, 2)):
        pair = marks[first], marks[second]
        rest = [mark for index, mark in enumerate(marks) if index not in (first, second)]
        if min(pair) > 0.15 and abs(pair[0] - pair[1]) < 0.25 and max(rest) < 0.05:
            return "pairs"
    return "mirror" if symmetric else ANY


def _striped(accent: np.ndarray, free: np.ndarray) -> bool:
    """True when rows of ``accent``, looked at where they are ``free`` of objects, alternate at one period."""
    profile = (accent & free).sum(1) / np.maximum(free.sum(1), 1)
    rows = profile > 0.5
    if np.abs(profile - rows).mean() > 0.15:
        return False
    edges = np.flatnonzero(np.diff(rows.astype(int)))
    periods = edges[2:] - edges[:-2]
    return len(periods) >= 3 and bool(np.ptp(periods) <= max(2, 0.05 * len(rows)))
