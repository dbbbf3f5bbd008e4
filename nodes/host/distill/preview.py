"""A picture of the student beside the teacher, from the same noise, while it learns."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from ....deltaconv_core.util.lettering import write
from .dataset import Dataset
from .network import LoadedModel

SAMPLING_STEPS = 8
CFG = 4.0
HEIGHT = 256
LABEL = 24


class Preview:
    """Draws the first picture of the dataset again, in a few Euler steps.

    Args:
        network: the teacher; with the blocks in place of attention, the student.
        mixers: the blocks, by site id.
        dataset: whose first condition is drawn from; with its empty one there is guidance.
        seed: of the noise.
        dtype: in which the training computes.
    """

    def __init__(
        self,
        network: LoadedModel,
        mixers: Mapping[str, nn.Module],
        dataset: Dataset,
        seed: int,
        dtype: torch.dtype,
    ) -> None:
        self.network = network
        self.mixers = mixers
        self.dtype = dtype
        sample = dataset.samples[0]
        self.positive = network.join([network.encode(sample.condition, sample.latent)])
        self.negative = dataset.empty and network.join([network.encode(dataset.empty, sample.latent)])
        self.noise = torch.randn(sample.latent.shape, generator=torch.Generator().manual_seed(seed))
        self.format = network.model.get_model_object("latent_format")
        self.teacher: Tensor | None = None

    @property
    def possible(self) -> bool:
        """Whether ComfyUI knows what this model's latents look like."""
        return self.format.latent_rgb_factors is not None

    @torch.no_grad()
    def __call__(self) -> Image.Image:
        """The teacher's picture left, the student's right."""
        with torch.autocast(self.network.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if self.teacher is None:
                self.teacher = self._draw()
            with self.network.tapping(self.mixers) as taps, taps.mode(mixing=True):
                student = self._draw()
        return _beside(self._colors(self.teacher), self._colors(student))

    def _draw(self) -> Tensor:
        """Euler's method (Karras et al. 2022) over evenly spaced noise levels of the model."""
        levels = self.network.sigmas.to(self.network.device)
        places = torch.linspace(len(levels) - 1, 0, SAMPLING_STEPS, device=levels.device).long()
        sigmas = [*levels[places].split(1), levels.new_zeros(1)]
        x = self.noise.to(levels.device) * sigmas[0]
        for sigma, following in pairwise(sigmas):
            x = x + (following - sigma) * (x - self._clean(x, sigma)) / sigma
        return x

    def _clean(self, x: Tensor, sigma: Tensor) -> Tensor:
        wanted = self.network.clean(x, sigma, self.positive)
        if not self.negative:
            return wanted
        unwanted = self.network.clean(x, sigma, self.negative)
        return unwanted + CFG * (wanted - unwanted)

    def _colors(self, latent: Tensor) -> Tensor:
        """(H, W, 3) bytes by ComfyUI's linear map from this model's latents to colors."""
        factors = torch.tensor(self.format.latent_rgb_factors, dtype=torch.float32).T
        bias: Any = getattr(self.format, "latent_rgb_factors_bias", None)
        bias = None if bias is None else torch.tensor(bias, dtype=torch.float32)
        latent = latent.float().cpu()
        if unpacked := getattr(self.format, "latent_rgb_factors_reshape", None):  # FLUX.2: 2 x 2 in one
            latent = unpacked(latent)
        colors = nn.functional.linear(latent[0].movedim(0, -1), factors, bias)
        colors = colors.reshape(latent.shape[-2], latent.shape[-1], 3)  # of an only frame, too
        return colors.add(1).mul(127.5).clamp(0, 255).byte()


def _beside(left: Tensor, right: Tensor) -> Image.Image:
    """Both pictures, enlarged pixel by pixel, with a line of text above them."""
    picture = Image.fromarray(torch.cat([left, right], dim=1).numpy())
    scale = max(1, HEIGHT // picture.height)
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    page = Image.new("RGB", (picture.width, picture.height + LABEL), "black")
    page.paste(picture, (0, LABEL))
    for number, name in enumerate(("attention", "ΔConv")):
        x = 4 + number * picture.width // 2
        write(ImageDraw.Draw(page), x, 2, [(name, "white")], LABEL - 6)
    return page
