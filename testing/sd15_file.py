"""A Stable Diffusion 1.5 model in one file with random weights, at full size, under the original's names."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

VAE = {
    "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
    "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
CLIP = {
    "num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
    "hidden_act": "quick_gelu", "max_position_embeddings": 77, "eos_token_id": 49407,
}  # fmt: skip


def write_sd15(path: Path) -> Path:
    """Writes the file, in float16: 2.1 GB."""
    random = torch.Generator().manual_seed(0)
    parts = {
        "model.diffusion_model.": _unet(),
        "first_stage_model.": _vae(),
        "cond_stage_model.transformer.": _clip(),
    }
    tensors = {
        f"{prefix}{name}": _weights(weight, random)
        for prefix, part in parts.items()
        for name, weight in part.named_parameters()
        if not name.startswith("text_projection")  # which the original has not
    }
    save_file(tensors, path)
    return path


def _unet() -> nn.Module:
    import comfy.supported_models

    from .comfy_architectures import ARCHITECTURES

    config = comfy.supported_models.SD15(ARCHITECTURES["sd15"].sized(small=False))
    config.set_inference_dtype(torch.float16, None)
    network: nn.Module = config.get_model({}, "", device=torch.device("meta")).diffusion_model
    return network


def _vae() -> nn.Module:
    from comfy.ldm.models.autoencoder import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL(ddconfig=VAE, embed_dim=4)


def _clip() -> nn.Module:
    from comfy.clip_model import CLIPTextModel
    from comfy.ops import disable_weight_init

    return CLIPTextModel(CLIP, torch.float16, torch.device("meta"), disable_weight_init)


def _weights(like: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """By which the model neither explodes nor fades."""
    values = torch.randn(like.shape, generator=random)
    if like.ndim == 1:
        return (1 + 0.1 * values).half()
    return (values * 0.4 / like[0].numel() ** 0.5).half()
