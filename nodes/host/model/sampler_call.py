"""Calling a MODEL's network as a sampler does: its options, and what it makes of a condition."""

from __future__ import annotations

from typing import Any

import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

COMPILED = "torch.compile"
"""ComfyUI's key of the wrapper that runs compiled code, which would not see what stands at the sites."""


def sampler_options(model: ModelPatcher) -> dict[str, Any]:
    """The MODEL's options as a sampler would use them, with its wrappers but for compiled code."""
    options = comfy.model_patcher.create_model_options_clone(model.model_options)
    transformer = options.setdefault("transformer_options", {})
    for kind, own in (("wrappers", model.wrappers), ("callbacks", model.callbacks)):
        merged = comfy.patcher_extension.merge_nested_dicts(
            transformer.setdefault(kind, {}), own, copy_dict1=False
        )
        transformer[kind] = merged
    transformer["wrappers"].get(WrappersMP.APPLY_MODEL, {}).pop(COMPILED, None)
    return options


def encode_condition(
    base: torch.nn.Module, condition: dict[str, Any], latent: Tensor, device: torch.device
) -> dict[str, Any]:
    """What a model makes of a condition for latents (B, C, H, W); `comfy.samplers.cond_cat` makes a call's of
    several.

    Args:
        base: ComfyUI's BaseModel.
        condition: as a sampler has it ("cross_attn", "pooled_output", ...).
        latent: without noise.
        device: of the result.
    """
    (encoded,) = comfy.samplers.encode_model_conds(
        base.extra_conds,
        [condition],
        torch.zeros_like(latent),
        device,
        "positive",
        latent_image=latent,
        denoise_mask=None,
        seed=None,
        latent_shapes=[latent.shape],
    )
    parts = encoded["model_conds"]
    return {name: part.process_cond(batch_size=len(latent), area=None) for name, part in parts.items()}
