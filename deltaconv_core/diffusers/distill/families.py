"""How each family of pipelines encodes a caption, and what its network is called with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...errors import DeltaConvError
from .buckets import PictureSize

Texts = dict[str, Tensor]


@dataclass(frozen=True)
class Cut:
    """Where a picture of a batch comes from.

    Args:
        size: of the upright picture.
        corner: (top, left) of what was cut out of the scaled picture.
        target: size of what was cut out.
    """

    size: PictureSize
    corner: tuple[int, int]
    target: PictureSize


class Family(Protocol):
    """One family of pipelines."""

    def encode(self, pipeline: Any, caption: str, device: torch.device) -> Texts:
        """A caption as tensors (1, ...) by name."""
        ...

    def conditioning(self, texts: Texts, cuts: list[Cut]) -> dict[str, Any]:
        """The network's arguments beside the latents and the timesteps.

        Args:
            texts: as `encode` made them, joined to (B, ...), on the network's device.
            cuts: one for each sample.
        """
        ...


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x: one text encoder."""

    def encode(self, pipeline: Any, caption: str, device: torch.device) -> Texts:
        embeds, _ = pipeline.encode_prompt(caption, device, 1, False)
        return {"embeds": embeds}

    def conditioning(self, texts: Texts, cuts: list[Cut]) -> dict[str, Any]:
        return {"encoder_hidden_states": texts["embeds"]}


class StableDiffusionXL:
    """Two text encoders, the second's pooled output, and the picture's sizes (Podell et al. 2023, 2.2)."""

    def encode(self, pipeline: Any, caption: str, device: torch.device) -> Texts:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            caption, device=device, do_classifier_free_guidance=False
        )
        return {"embeds": embeds, "pooled": pooled}

    def conditioning(self, texts: Texts, cuts: list[Cut]) -> dict[str, Any]:
        ids = [[*cut.size, *cut.corner, *cut.target] for cut in cuts]
        added = {"text_embeds": texts["pooled"], "time_ids": torch.tensor(ids).to(texts["pooled"])}
        return {"encoder_hidden_states": texts["embeds"], "added_cond_kwargs": added}


@dataclass(frozen=True)
class PixArt:
    """T5 with a mask; some models are told resolution and shape too.

    Args:
        sized: whether this one is.
    """

    sized: bool

    def encode(self, pipeline: Any, caption: str, device: torch.device) -> Texts:
        embeds, mask, _, _ = pipeline.encode_prompt(caption, device=device, do_classifier_free_guidance=False)
        return {"embeds": embeds, "mask": mask}

    def conditioning(self, texts: Texts, cuts: list[Cut]) -> dict[str, Any]:
        added: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if self.sized:
            sizes = torch.tensor([cut.target for cut in cuts]).to(texts["embeds"])
            added = {"resolution": sizes, "aspect_ratio": sizes[:, :1] / sizes[:, 1:]}
        return {
            "encoder_hidden_states": texts["embeds"],
            "encoder_attention_mask": texts["mask"],
            "added_cond_kwargs": added,
        }


def family_of(pipeline: Any, network: Any) -> Family:
    """The family of a pipeline.

    Raises:
        DeltaConvError: one whose network cannot be called.
    """
    config = network.config
    if "caption_channels" in config:
        return PixArt(bool(network.use_additional_conditions))
    added = config.addition_embed_type
    if config.in_channels != pipeline.vae.config.latent_channels:
        raise DeltaConvError(
            f"this teacher takes {config.in_channels} channels where its VAE makes "
            f"{pipeline.vae.config.latent_channels} (inpainting, or another special model?); choose a model "
            "that makes pictures from text"
        )
    if added is None and config.class_embed_type is None and config.encoder_hid_dim_type is None:
        return StableDiffusion()
    if added == "text_time" and pipeline.text_encoder is not None:
        return StableDiffusionXL()
    raise DeltaConvError(
        f"this teacher ({type(pipeline).__name__} with addition_embed_type {added!r}, class_embed_type "
        f"{config.class_embed_type!r}) takes more than captions and sizes; choose Stable Diffusion 1.x, "
        "2.x, the SDXL base model, or PixArt"
    )
