"""What the demo teacher is shown: pictures of several sizes, at the noise where shapes are decided, with the
objects counting for more than the rest."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from ..words import SLOTS, Prompt, token_rows
from .diffusion import FULL, TIMESTEPS, drop_words, picture_weight
from .drawings import Scene, draw, every_prompt, is_held_out, random_scene

#: Noise above which an object's place is still open. Weighing objects up there would draw them too large.
PLACE_KNOWN = 550

#: How often a layout is shown, for each time that the easy ones (plain, frame) are.
LAYOUTS = {"pairs": 3.0, "mirror": 2.5, "stripes": 2.5}


class Lesson(NamedTuple):
    """One step's training pictures, all of one size."""

    pictures: torch.Tensor  # (B, 3, S, S) in [-1, 1]
    rows: torch.Tensor  # (B, 6) of the embedding table
    timesteps: torch.Tensor  # (B,)
    noise: torch.Tensor  # (B, 3, S, S)
    weights: torch.Tensor  # (B, 1, S, S) of the squared error

    def chunks(self, count: int) -> list[Lesson]:
        """The same pictures in ``count`` parts."""
        parts = [part.chunk(count) for part in self]
        return [Lesson(*part) for part in zip(*parts, strict=True)]


def matters(scene: Scene, size: int, reach: float = 1.5) -> np.ndarray:
    """(size, size) bool: pixels within ``reach`` radii of an object's centre, and all places where the
    layout may have drawn something that must agree with a place far away."""
    grid = (np.arange(size) + 0.5) / size
    x, y = np.meshgrid(grid, grid)
    distance = [np.hypot(x - cx, y - cy) for cx, cy in scene.centers]
    near: np.ndarray = np.min(distance, axis=0) < reach * scene.radius
    if scene.prompt.layout == "pairs":
        near |= (np.minimum(x, 1 - x) < 0.2) & (np.minimum(y, 1 - y) < 0.2)
    elif scene.prompt.layout in ("mirror", "stripes"):
        near |= True
    return near


class Lessons(Dataset[Lesson]):
    """Lessons by step number: the same on every machine and after every resume.

    Every size costs about the same time a step: ``batch_size`` pictures of 48x48, fewer of larger ones.
    ``shares`` says how many of the steps each size gets. ``other_shapes`` is the part of the pictures that
    come with the word of a random shape: for a guided training, in which the words decide what is right, not
    the picture.
    """

    def __init__(
        self,
        batch_size: int,
        shares: dict[int, float],
        seed: int,
        object_weight: float = 6.0,
        whole_drop: float = 0.1,
        word_drop: float = 0.08,
        other_shapes: float = 0.0,
    ) -> None:
        self.batch_size, self.seed, self.object_weight = batch_size, seed, object_weight
        self.other_shapes = other_shapes
        self.sizes = list(shares)
        self.shares = np.array(list(shares.values())) / sum(shares.values())
        self.drops = (whole_drop, word_drop)
        self.prompts = [prompt for prompt in every_prompt() if not is_held_out(prompt)]
        chances = np.array([LAYOUTS.get(prompt.layout, 1.0) for prompt in self.prompts])
        self.chances = chances / chances.sum()

    def __getitem__(self, step: int) -> Lesson:
        rng = np.random.default_rng((self.seed, step))
        size = int(rng.choice(self.sizes, p=self.shares))
        count = max(4, 4 * round(self.batch_size / 4 * (FULL / size) ** 2))
        prompts = [self.prompts[i] for i in rng.choice(len(self.prompts), size=count, p=self.chances)]
        scenes = [random_scene(prompt, rng) for prompt in prompts]
        drawn = torch.from_numpy(np.stack([draw(scene, size) for scene in scenes]))
        told = [self.told(prompt, rng) for prompt in prompts]
        rows = torch.tensor([token_rows(drop_words(prompt, rng, *self.drops)) for prompt in told])
        timesteps = torch.from_numpy(draw_timesteps(count, size, rng))
        noise = torch.from_numpy(rng.standard_normal((count, 3, size, size), dtype=np.float32))
        near = torch.from_numpy(np.stack([matters(scene, size) for scene in scenes]))
        near &= (timesteps < PLACE_KNOWN).view(-1, 1, 1)
        weights = picture_weight(timesteps).view(-1, 1, 1, 1) * (1 + (self.object_weight - 1) * near[:, None])
        return Lesson(drawn.permute(0, 3, 1, 2).float() / 127.5 - 1, rows, timesteps, noise, weights)

    def told(self, prompt: Prompt, rng: np.random.Generator) -> Prompt:
        """What the model is told of a picture of ``prompt``: never a held-out combination."""
        if not self.other_shapes or rng.random() >= self.other_shapes:
            return prompt
        other = prompt._replace(shape=str(rng.choice(SLOTS["shape"])))
        return prompt if is_held_out(other) else other


def draw_timesteps(count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """(count,) timesteps: a third anywhere, the others about where shapes and layouts are decided.

    That is at more noise in larger pictures, where a shape has more pixels to be seen by.
    """
    middle = 420 + 100 * np.log2(size / FULL)
    decided = np.clip(rng.normal(middle, 150, count), 0, TIMESTEPS - 1)
    anywhere = rng.uniform(0, TIMESTEPS, count)
    return np.where(rng.random(count) < 0.35, anywhere, decided).astype(np.int64)
