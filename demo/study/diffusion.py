"""The demo model's noise schedule and the training pictures as tensors; no ComfyUI needed.

The schedule is DDPM's (Ho et al. 2020, section 4): 1000 steps, betas linear from 0.0001 to 0.02. The
network is given alpha * picture + sigma * noise and predicts the picture.
"""

from __future__ import annotations

import numpy as np
import torch

from ..words import ANY, Prompt, token_rows
from .drawings import draw, every_prompt, is_held_out, random_scene

TIMESTEPS = 1000
#: Sides of the pictures that students are trained on: a fifth of the batches, and the others.
SMALL, FULL = 32, 48


def alpha_sigma(timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Signal and noise scale of integer ``timesteps`` (B,), as (B, 1, 1, 1) in fp32; alpha² + sigma² = 1."""
    betas = torch.linspace(0.0001, 0.02, TIMESTEPS, dtype=torch.float64, device=timesteps.device)
    alpha_bar = torch.cumprod(1 - betas, 0)[timesteps].float().view(-1, 1, 1, 1)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def picture_weight(timesteps: torch.Tensor, limit: float = 6.0) -> torch.Tensor:
    """Weight (B,) of the squared error of the predicted picture: that of the error in v, 1 + SNR, cut at
    ``limit``."""
    alpha, sigma = alpha_sigma(timesteps)
    return (1 + (alpha / sigma).square()).clamp(max=limit).flatten()


def drop_words(prompt: Prompt, rng: np.random.Generator, whole: float, each: float) -> Prompt:
    """Open the whole prompt with probability ``whole``, else every slot with probability ``each``."""
    if rng.random() < whole:
        return Prompt()
    return Prompt(*(ANY if rng.random() < each else word for word in prompt))


class DrawnBatches:
    """Training batches by number: ``batches(step)`` is the same on every machine and after every resume."""

    def __init__(self, batch_size: int, seed: int, whole_drop: float = 0.1, word_drop: float = 0.08) -> None:
        self.batch_size = batch_size
        self.seed = seed
        self.drops = (whole_drop, word_drop)
        self.prompts = [prompt for prompt in every_prompt() if not is_held_out(prompt)]

    def __call__(self, step: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pictures (B, 3, size, size) in [-1, 1], word rows (B, 6), timesteps (B,) and noise, all of
        ``step``.

        Timesteps are drawn as u^1.4 of the range: the schedule spends a quarter of its steps at noise so
        strong that nothing of the picture is left.
        """
        rng = np.random.default_rng((self.seed, step))
        chosen = [self.prompts[i] for i in rng.integers(len(self.prompts), size=self.batch_size)]
        pictures = np.stack([draw(random_scene(prompt, rng), size) for prompt in chosen])
        rows = [token_rows(drop_words(prompt, rng, *self.drops)) for prompt in chosen]
        timesteps = (rng.random(self.batch_size) ** 1.4 * TIMESTEPS).astype(np.int64)
        noise = rng.standard_normal((self.batch_size, 3, size, size), dtype=np.float32)
        x0 = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        return x0, torch.tensor(rows), torch.from_numpy(timesteps), torch.from_numpy(noise)
