"""Draws the pictures that the demo model is trained on.

Coordinates are fractions of the picture's side, y pointing down, so the same scene can be drawn at any
size. In every layout but ``plain`` parts that are far apart must agree, which is work for a global token
mixer: ``mirror`` is symmetric about the vertical axis, ``frame`` has one colour and width on all four
sides, ``stripes`` keep one period and colour across the picture, ``pairs`` puts the same mark into two
opposite corners. Objects of one picture always share shape, colour and size.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from zlib import crc32

import numpy as np

from ..words import SLOTS, Prompt

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 160, 40),
    "blue": (30, 60, 220),
    "yellow": (250, 220, 20),
    "purple": (150, 40, 200),
}
#: Colours of frames, stripes, marks and mirrored blocks; no object has one of them.
ACCENTS: dict[str, tuple[int, int, int]] = {
    "teal": (0, 190, 190),
    "orange": (255, 140, 0),
    "pink": (255, 140, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
    "black": (15, 15, 15),
}

_COUNT = {"one": 1, "two": 2, "three": 3}
_SPACING = {1: 0.0, 2: 0.36, 3: 0.3}
#: Smallest and largest radius: as large as leaves neighbours apart.
_RADIUS = {1: (0.13, 0.17), 2: (0.12, 0.15), 3: (0.105, 0.125)}


@dataclass(frozen=True)
class Scene:
    """A prompt and everything it leaves open, drawn from a random generator."""

    prompt: Prompt
    radius: float
    centers: tuple[tuple[float, float], ...]
    accent: str
    period: float
    phase: float
    vertical: bool
    frame_width: float
    blocks: tuple[tuple[float, float, float, float], ...]


def every_prompt() -> list[Prompt]:
    """All complete prompts, in a fixed order."""
    return [Prompt(*words) for words in product(*SLOTS.values())]


def is_held_out(prompt: Prompt) -> bool:
    """True for the tenth of all complete prompts that training never sees."""
    return crc32(str(prompt).encode()) % 10 == 0


def as_seen(prompt: Prompt) -> Prompt:
    """The prompt as its picture shows it: mirrored columns look the same at the left and at the right."""
    mirrored = prompt.layout == "mirror" and prompt.position == "right"
    return prompt._replace(position="left") if mirrored else prompt


def random_scene(prompt: Prompt, rng: np.random.Generator) -> Scene:
    """Fill in what a complete ``prompt`` leaves open."""
    count = _COUNT[prompt.count]
    radius = rng.uniform(*_RADIUS[count])
    blocks = tuple(
        (rng.uniform(0.02, 0.3), rng.uniform(0.02, 0.8), rng.uniform(0.08, 0.18), rng.uniform(0.08, 0.18))
        for _ in range(2)
    )
    return Scene(
        prompt=prompt,
        radius=radius,
        centers=_centers(prompt, count, rng),
        accent=str(rng.choice(list(ACCENTS))),
        period=rng.uniform(0.2, 0.3),
        phase=rng.uniform(0.0, 1.0),
        vertical=bool(rng.integers(2)),
        frame_width=rng.uniform(0.045, 0.09),
        blocks=blocks,
    )


def _centers(prompt: Prompt, count: int, rng: np.random.Generator) -> tuple[tuple[float, float], ...]:
    """Objects stand in a column at the left and right, in a row elsewhere; mirrored when the layout says
    so."""
    mirror = prompt.layout == "mirror"
    side = {"left": -0.25, "right": 0.25, "top": -0.25, "bottom": 0.25, "center": 0.0}[prompt.position]
    side += rng.uniform(-0.02, 0.02) if prompt.position != "center" else 0.0
    along = (np.arange(count) - (count - 1) / 2) * _SPACING[count]
    column = prompt.position in ("left", "right")
    slack = {1: 0.12, 2: 0.06, 3: 0.03}[count] if prompt.position != "center" else 0.0
    if column or not mirror:
        along = along + rng.uniform(-slack, slack)
    if not column:
        return tuple((0.5 + float(a), 0.5 + side) for a in along)
    centers = tuple((0.5 + side, 0.5 + float(a)) for a in along)
    return centers + tuple((1 - x, y) for x, y in centers) if mirror else centers


def shape_distance(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Distance to the outline of ``shape`` of the given ``radius``, negative inside, at offsets from its
    centre.

    Exact for the circle; for the polygons a distance to the nearest edge's line, which is all an anti-aliased
    outline needs.
    """
    ax, ay = np.abs(dx), np.abs(dy)
    if shape == "circle":
        return np.hypot(dx, dy) - radius
    if shape == "square":
        return np.maximum(ax, ay) - 0.87 * radius
    if shape == "diamond":
        return (ax + ay - 1.15 * radius) / np.sqrt(2.0)
    if shape == "triangle":  # point up; base at +0.9 r, apex at -r
        return np.maximum(dy - 0.9 * radius, (1.9 * ax - dy - radius) / np.hypot(1.9, 1.0))
    if shape == "cross":
        arm = 0.34 * radius
        return np.minimum(np.maximum(ax - arm, ay - radius), np.maximum(ay - arm, ax - radius))
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SLOTS['shape'])}")


def draw(scene: Scene, size: int) -> np.ndarray:
    """Draw ``scene`` with anti-aliased edges; returns uint8 (size, size, 3)."""
    prompt = scene.prompt
    grid = (np.arange(size) + 0.5) / size
    x, y = np.meshgrid(grid, grid)
    picture = np.empty((size, size, 3), np.float64)
    picture[:] = BACKGROUNDS[prompt.background]

    def paint(distance: np.ndarray, color: tuple[int, int, int]) -> None:
        cover = np.clip(0.5 - distance * size, 0.0, 1.0)[..., None]
        picture[:] = picture * (1 - cover) + np.asarray(color) * cover

    accent = ACCENTS[scene.accent]
    if prompt.layout == "stripes":
        across = ((x if scene.vertical else y) / scene.period + scene.phase) % 1.0
        paint((np.abs(across - 0.5) - 0.25) * scene.period, accent)
    elif prompt.layout == "mirror":
        for left, top, width, height in scene.blocks:
            away = np.minimum(np.abs(x - left - width / 2), np.abs(1 - x - left - width / 2)) - width / 2
            paint(np.maximum(away, np.abs(y - top - height / 2) - height / 2), accent)
    elif prompt.layout == "pairs":
        across = x if scene.vertical else 1 - x
        for corner in (0.09, 0.91):
            paint(np.maximum(np.abs(across - corner), np.abs(y - corner)) - scene.frame_width, accent)
    for cx, cy in scene.centers:
        paint(shape_distance(prompt.shape, x - cx, y - cy, scene.radius), COLORS[prompt.color])
    if prompt.layout == "frame":
        paint(np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y)) - scene.frame_width, accent)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)
