"""Tiny MODELs of ComfyUI's own DiTs with joint attention of text and image."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from .comfy_models import make_model

TEXT = 5  # tokens of text in `joint_conditioning`
WIDTH = 24  # of its embedding


def make_joint(name: str) -> Any:
    """A ModelPatcher with random weights.

    Args:
        name: flux, flux_reference, sd3, sd35 (two attentions in its first block), lumina2, z_image (tokens
            filled up to a multiple) or qwen_image.
    """
    import comfy.supported_models as models
    from comfy.ldm.flux.model import FluxParams

    flux = {
        "in_channels": 16,
        "out_channels": 16,
        "vec_in_dim": 12,
        "context_in_dim": WIDTH,
        "hidden_size": 32,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 2,
        "depth_single_blocks": 2,
        "axes_dim": [4, 6, 6],
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
        "guidance_embed": False,
    }
    sd3 = {
        "in_channels": 16,
        "patch_size": 2,
        "depth": 2,
        "input_size": None,
        "adm_in_channels": 12,
        "num_patches": 1024,
        "pos_embed_max_size": 32,
        "pos_embed_scaling_factor": None,
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": WIDTH, "out_features": 128},
        },
    }
    lumina = {
        "patch_size": 2,
        "in_channels": 16,
        "dim": 32,
        "cap_feat_dim": WIDTH,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 1,
        "qk_norm": True,
        "axes_dims": [4, 6, 6],
        "axes_lens": [300, 512, 512],
    }
    qwen = {
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "axes_dims_rope": (4, 6, 6),
    }
    config, unet = {
        "flux": (models.Flux, flux),
        "flux_reference": (models.Flux, flux),
        "sd3": (models.SD3, sd3),
        "sd35": (models.SD3, sd3 | {"x_block_self_attn_layers": [0]}),
        "lumina2": (models.Lumina2, lumina),
        "z_image": (models.Lumina2, lumina | {"pad_tokens_multiple": 32}),
        "qwen_image": (models.QwenImage, qwen),
    }[name]
    if config is models.Flux and "txt_ids_dims" in inspect.signature(FluxParams).parameters:
        unet = unet | {"txt_ids_dims": []}  # ComfyUI's own detection adds it in newer versions
    model = make_model(config(unet))
    for buffer in model.model.diffusion_model.buffers():
        buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(0)))
    return model


def joint_conditioning(name: str) -> list[Any]:
    """What a text encoder would give for this model; for flux_reference with a picture of another size."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(1, TEXT, WIDTH, generator=generator)
    more = {"pooled_output": torch.randn(1, 12, generator=generator)}
    if name == "flux_reference":
        more["reference_latents"] = [torch.randn(1, 16, 6, 8, generator=generator)]
    if name in ("lumina2", "z_image"):
        more["attention_mask"] = torch.ones(1, TEXT, dtype=torch.long)
    return [[text, more]]
