"""Prompts in ComfyUI's API format for the tests' servers, and weights for the model in them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from deltaconv_core import BlockSpec, Checkpoint, DeltaConvBlock, save_checkpoint

ARCHITECTURE = "unet-32x2-64x3"
SITES = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1": 32,
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1": 64,
    "mid_block.attentions.0.transformer_blocks.0.attn1": 64,
    "up_blocks.0.attentions.1.transformer_blocks.0.attn1": 64,
    "up_blocks.1.attentions.1.transformer_blocks.0.attn1": 32,
}


def write_weights(
    path: Path, seed: int = 0, architecture: str = ARCHITECTURE, sites: dict[str, int] = SITES
) -> Path:
    """A file of random blocks for the small model (or for others)."""
    torch.manual_seed(seed)
    blocks = {id: DeltaConvBlock(BlockSpec(channels, 3)) for id, channels in sites.items()}
    for block in blocks.values():
        block.conv_out.weight.data *= 20
    save_checkpoint(Checkpoint(architecture, blocks), path)
    return path


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def base_prompt(seed: int = 7, size: tuple[int, int] = (16, 24), steps: int = 2) -> dict[str, Any]:
    """The model without ΔConv, sampled and decoded to a preview (node "attention picture")."""
    prompt = {
        "model": node("PlainModel"),
        "positive": node("PlainConditioning", seed=1),
        "negative": node("PlainConditioning", seed=2),
        "latent": node("PlainLatent", height=size[0], width=size[1]),
        "vae": node("VAELoader", vae_name="pixel_space"),
    }
    return prompt | branch("attention", "model", seed, steps)


def branch(name: str, model: str, seed: int = 7, steps: int = 2, latent: str = "latent") -> dict[str, Any]:
    """Sampler, decoder and preview for one MODEL of a prompt."""
    sampler = node(
        "KSampler",
        model=[model, 0],
        positive=["positive", 0],
        negative=["negative", 0],
        latent_image=[latent, 0],
        seed=seed,
        steps=steps,
        cfg=3.0,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
    )
    return {
        name: sampler,
        f"{name} decoded": node("VAEDecode", samples=[name, 0], vae=["vae", 0]),
        f"{name} picture": node("PreviewImage", images=[f"{name} decoded", 0]),
    }


def patch_node(model: str = "model", **changes: Any) -> dict[str, Any]:
    """ΔConv Patch Model with its defaults."""
    inputs = {
        "weights": "small.safetensors",
        "blocks": "all",
        "start_percent": 0.0,
        "end_percent": 1.0,
        "base_weights": "apply",
        "base_weights_strength": 1.0,
    }
    return node("DeltaConvPatchModel", model=[model, 0], **inputs | changes)


def both(first: str = "attention", seed: int = 7, steps: int = 2) -> dict[str, Any]:
    """Attention and ΔConv clones of one model in one prompt; `first` is sampled first.

    The second sampler's empty latent is blended with the first one's result at weight 0, so it has to wait.
    """
    prompt = (
        base_prompt(seed, steps=steps) | {"patched": patch_node()} | branch("ΔConv", "patched", seed, steps)
    )
    second = "ΔConv" if first == "attention" else "attention"
    waiting = node("LatentBlend", samples1=["latent", 0], samples2=[first, 0], blend_factor=1.0)
    prompt["waiting"] = waiting
    prompt[second]["inputs"]["latent_image"] = ["waiting", 0]
    return prompt


def pictures(server: Any, outputs: dict[str, Any]) -> dict[str, bytes]:
    """Pixels by branch name. (The files also hold the prompt, so they differ between prompts.)"""
    return {
        id.removesuffix(" picture"): Image.open(io.BytesIO(server.view(output["images"][0]))).tobytes()
        for id, output in outputs.items()
        if id.endswith(" picture")
    }
