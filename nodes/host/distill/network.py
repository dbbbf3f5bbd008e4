"""A ComfyUI MODEL as `deltaconv_core.distill.Network`.

Whatever a model predicts, ComfyUI turns it into the clean latent. Here that becomes the noise again, in
ComfyUI's terms: x = alpha x0 + sigma n, so n = (x - alpha x0) / sigma, with alpha = 1, or 1 - sigma for flow
models. An error d of the clean latent is an error of d sqrt(SNR) in the noise, so the Min-SNR weight for
noise, min(gamma / SNR, 1), makes it min(gamma, SNR) d²; with the weights that Min-SNR has for models that
predict v or the clean latent it comes to the same. So one form covers models of every kind of prediction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import comfy.model_management
import comfy.model_sampling
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock, attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....deltaconv_core.distill import Batch, Taps, tapped
from ....deltaconv_core.distill.taps import GridOf
from ....deltaconv_core.errors import DeltaConvError
from ..model.sampler_call import encode_condition, sampler_options
from ..model.sites import Site, network_of
from ..patch.conflicts import replacements


class LoadedModel:
    """A loaded MODEL (see `borrow.borrowed_model`) as a network that noisy latents go through.

    Args:
        model: ModelPatcher.
    """

    prediction = "epsilon"

    def __init__(self, model: ModelPatcher) -> None:
        self.model = model
        self.base = model.model
        self.device = model.load_device
        self.sampling = model.get_model_object("model_sampling")
        self.flow = isinstance(self.sampling, comfy.model_sampling.CONST)
        self.attentions: dict[str, torch.nn.Module] = {}
        self.grids: dict[str, GridOf] = {}
        self.streams: dict[str, torch.nn.Module] = {}
        self.options = _sampler_options(model)

    @property
    def segments(self) -> Iterable[torch.nn.Module]:
        return ()

    def tapping(self, mixers: Mapping[str, torch.nn.Module]) -> AbstractContextManager[Taps]:
        """Inside, the mixers stand beside the attentions."""
        return tapped(self.attentions, mixers, self.grids)

    def __call__(self, batch: Batch) -> Tensor:
        """The noise (B, C, ..., H, W) in the batch's latents; its inputs are (sigmas (B,), conditions)."""
        sigma, conditions = batch.inputs
        clean = self.clean(batch.noisy, sigma, conditions)
        sigma = _column(sigma, clean)
        return (batch.noisy - self.alpha(sigma) * clean) / sigma

    def clean(self, noisy: Tensor, sigma: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        """The clean latents (B, C, ..., H, W) that the model sees in noisy ones, at sigmas (B,)."""
        options = {**self.options["transformer_options"], "sigmas": sigma, "cond_or_uncond": [0]}
        call = {**conditions, "transformer_options": options}
        if wrapper := self.options.get("model_function_wrapper"):
            arguments = {"input": noisy, "timestep": sigma, "c": call, "cond_or_uncond": [0]}
            return wrapper(self.base.apply_model, arguments)
        return self.base.apply_model(noisy, sigma, **call)

    @property
    def sigmas(self) -> Tensor:
        """The noise levels that the model was trained at, rising."""
        return self.sampling.sigmas

    def alpha(self, sigma: Tensor) -> Tensor:
        """The share of the clean latent in a noisy one."""
        return 1 - sigma if self.flow else torch.ones_like(sigma)

    def batch(self, clean: Tensor, noise: Tensor, sigma: Tensor, conditions: Mapping[str, Any]) -> Batch:
        """A batch of clean latents (B, C, ..., H, W) under noise at sigmas (B,)."""
        scale = _column(sigma, clean)
        noisy = self.alpha(scale) * clean + scale * noise
        return Batch(noisy, noise, (self.alpha(sigma) / sigma).square(), (sigma, conditions))

    def encode(self, condition: dict[str, Any], latent: Tensor) -> dict[str, Any]:
        """What the model makes of a condition for a latent (1, C, ..., H, W); `join` joins several."""
        return encode_condition(self.base, condition, latent, self.device)

    @staticmethod
    def fit(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
        """Whether two encoded conditions can be in one batch; ComfyUI lets the lengths of texts differ."""
        return comfy.samplers.cond_equal_size(first, second)

    @staticmethod
    def join(encoded: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The conditions of one call."""
        return comfy.samplers.cond_cat(encoded)


class ComfyNetwork(LoadedModel):
    """One with self-attention among the tokens of the image, and where that is in it.

    Args:
        model: ModelPatcher.
        sites: those to be learned, by id.

    Raises:
        DeltaConvError: something on the MODEL keeps its self-attention from being learned.
    """

    def __init__(self, model: ModelPatcher, sites: Mapping[str, Site]) -> None:
        super().__init__(model)
        self.attentions = {id: comfy.utils.get_attr(self.base, site.path) for id, site in sites.items()}
        self.grids = {id: site.grid_of for id, site in sites.items()}
        self.streams = {id: _stream(self.base, site) for id, site in sites.items()}
        _check(model, sites)

    @property
    def segments(self) -> Iterable[torch.nn.Module]:
        network: Any = network_of(self.model)
        if isinstance(network, UNetModel):
            return [m for m in network.modules() if isinstance(m, (BasicTransformerBlock, ResBlock))]
        return list(network.blocks)


def _column(values: Tensor, like: Tensor) -> Tensor:
    """One value for each sample of a batch."""
    return values.view(-1, *[1] * (like.ndim - 1))


def _stream(base: torch.nn.Module, site: Site) -> torch.nn.Module:
    """The module that reads the residual stream right after the attention."""
    block = comfy.utils.get_attr(base, site.path.rpartition(".")[0])
    if not isinstance(block, BasicTransformerBlock):
        return block.cross_attn
    return block.norm3 if block.attn2 is None else block.norm2


def _sampler_options(model: ModelPatcher) -> dict[str, Any]:
    """The MODEL's options as a sampler would use them, but for code that gradients cannot pass."""
    options = sampler_options(model)
    options["transformer_options"]["optimized_attention_override"] = _differentiable_attention
    return options


def _differentiable_attention(chosen: Any, *args: Any, **kwargs: Any) -> Tensor:
    """PyTorch's attention; others that ComfyUI can be started with are inexact or have no gradient."""
    return attention_pytorch(*args, **kwargs)


def _check(model: ModelPatcher, sites: Mapping[str, Site]) -> None:
    replace = model.model_options["transformer_options"].get("patches_replace", {}).get("attn1", {})
    if sentence := replacements(replace, sites):
        raise DeltaConvError(f"{sentence}, so it cannot learn there: take that node off the MODEL")
    management = comfy.model_management
    other = management.sage_attention_enabled() or management.flash_attention_enabled()
    if other and not isinstance(model.model.diffusion_model, UNetModel):
        raise DeltaConvError(
            "ComfyUI was started with --use-sage-attention or --use-flash-attention, which give no "
            "gradients; to distil PixArt, start it with --use-pytorch-cross-attention"
        )
