"""Having a diffusers pipeline draw a picture, as far as its latent."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ..errors import DeltaConvError

SEEDS = -(2**63), 2**64 - 1  # that PyTorch takes


def draw_picture(pipeline: Any, prompt: str, *, steps: int, seed: int, **options: Any) -> None:
    """Draws, and drops the picture.

    Args:
        pipeline: of diffusers.
        prompt: of the picture.
        steps: of the sampling, at least 1.
        seed: of the noise, within SEEDS.
        options: of the pipeline's call; those that it does not know are left out.

    Raises:
        DeltaConvError: a picture that it cannot draw.
    """
    if steps < 1:
        raise DeltaConvError(f"expected at least one step, got {steps}")
    if not SEEDS[0] <= seed <= SEEDS[1]:
        raise DeltaConvError(f"expected a seed from {SEEDS[0]} to {SEEDS[1]}, got {seed}")
    known = inspect.signature(type(pipeline).__call__).parameters
    options |= {
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
        "use_resolution_binning": False,  # PixArt: the size that was asked for
    }
    try:
        # By name: the first argument of FLUX.2's and Kontext's pipelines is a reference picture.
        pipeline(prompt=prompt, **{name: value for name, value in options.items() if name in known})
    except DeltaConvError:
        raise
    except (ValueError, torch.cuda.OutOfMemoryError) as error:
        raise DeltaConvError(
            f"the pipeline cannot draw this picture: {error}; choose another size"
        ) from error
