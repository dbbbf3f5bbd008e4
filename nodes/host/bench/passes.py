"""Single passes of a MODEL's network on random input, timed on its device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.ldm.pixart.pixartms import PixArtMS
from comfy.model_patcher import ModelPatcher

from ....deltaconv_core.bench import Span
from ..model.sampler_call import encode_condition, sampler_options
from ..model.sites import Site, network_of
from ..model.standing import standing_forward

TEXT = 77  # tokens of the text, as many as one chunk of CLIP's
POOLED = 1280  # channels of SDXL's pooled text


@dataclass(frozen=True)
class Given:
    """What a network is called with.

    Args:
        latent: (B, C, H, W).
        sigma: (B,), a noise level in the middle.
        conditions: a random text, and whatever else the model asks for.
    """

    latent: torch.Tensor
    sigma: torch.Tensor
    conditions: dict[str, Any]


@torch.inference_mode()
def random_input(model: ModelPatcher, batch: int, size: tuple[int, int]) -> Given:
    """Random input for a MODEL.

    Args:
        model: ModelPatcher.
        batch: samples.
        size: rows and columns of the latent.
    """
    device, base = model.load_device, model.model
    latent = torch.randn(batch, base.latent_format.latent_channels, *size, device=device)
    width = _text_width(model)
    text = torch.randn(1, TEXT, width) if width else None
    (condition,) = comfy.sampler_helpers.convert_cond([[text, {"pooled_output": torch.zeros(1, POOLED)}]])
    conditions = comfy.samplers.cond_cat([encode_condition(base, condition, latent, device)])
    if base.adm_channels:
        conditions["y"] = torch.randn(batch, base.adm_channels, device=device)
    sigmas = model.get_model_object("model_sampling").sigmas
    return Given(latent, sigmas[len(sigmas) // 2].to(device).expand(batch), conditions)


def _text_width(model: ModelPatcher) -> int | None:
    network = network_of(model)
    if isinstance(network, PixArtMS):
        return int(network.y_embedder.y_proj.fc1.in_features)
    width = model.model.model_config.unet_config.get("context_dim")
    return width[0] if isinstance(width, list) else width


@torch.inference_mode()
def one_pass(model: ModelPatcher, given: Given) -> Span:
    """Runs the network of a MODEL, which ComfyUI loads before; the time is that of the network alone.

    Code that torch.compile made is left out.
    """
    comfy.model_management.load_models_gpu(
        [model], memory_required=model.memory_required(list(given.latent.shape))
    )
    model.pre_run()
    try:
        options = sampler_options(model)["transformer_options"]
        options |= {"sigmas": given.sigma, "cond_or_uncond": [0]}
        with Span(model.load_device) as span:
            model.model.apply_model(
                given.latent, given.sigma, **given.conditions, transformer_options=options
            )
        return span
    finally:
        model.cleanup()


def without_attention(model: ModelPatcher, sites: Iterable[Site]) -> ModelPatcher:
    """A clone whose self-attention costs nothing: what comes in goes out. No replacement can be faster."""
    clone = model.clone()
    for site in sites:
        clone.add_object_patch(f"{site.path}.forward", _same)
    return clone


def _same(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return x


class Clock:
    """Times of the calls at the sites, and the grids of their tokens, by site id."""

    def __init__(self) -> None:
        self.spans: dict[str, list[Span]] = {}
        self.grids: dict[str, tuple[int, int]] = {}

    def put_on(self, model: ModelPatcher, sites: Iterable[Site]) -> ModelPatcher:
        """A clone of the MODEL in which the calls are timed, whatever stands at the sites."""
        clone = model.clone()
        for site in sites:
            key = f"{site.path}.forward"
            clone.add_object_patch(key, self._timed(clone, site, clone.object_patches.get(key)))
        return clone

    def _timed(
        self, model: ModelPatcher, site: Site, patch: Callable[..., torch.Tensor] | None
    ) -> Callable[..., torch.Tensor]:
        def run(x: torch.Tensor, *args: Any, **call: Any) -> torch.Tensor:
            self.grids[site.id] = site.grid_of(x, call)
            forward = standing_forward(model, site.path) if patch is None else patch
            with Span(x.device) as span:
                y = forward(x, *args, **call)
            self.spans.setdefault(site.id, []).append(span)
            return y

        return run
