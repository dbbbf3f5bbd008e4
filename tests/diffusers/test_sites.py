"""The site tables, one by one, against diffusers' own models of the published configurations."""

from __future__ import annotations

import pytest
import torch

from deltaconv_core.sites import identify, site_channels
from scripts.comfy_host import prepare_torchvision

prepare_torchvision()  # diffusers imports it by way of transformers
diffusers = pytest.importorskip("diffusers")

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"
SD = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (CROSS, CROSS, CROSS, PLAIN),
    "up_block_types": (PLAIN_UP, CROSS_UP, CROSS_UP, CROSS_UP),
}
XL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": (PLAIN, CROSS, CROSS),
    "up_block_types": (CROSS_UP, CROSS_UP, PLAIN_UP),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
}
UNETS = {
    "sd15": {**SD, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd15 inpainting": {**SD, "cross_attention_dim": 768, "attention_head_dim": 8, "in_channels": 9},
    "sd21": {
        **SD,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {**XL, "transformer_layers_per_block": (1, 2, 10)},
    "ssd1b": {
        **XL,
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    },
    "unet-768x20-1536x24": {  # the refiner of SDXL
        "block_out_channels": (384, 768, 1536, 1536),
        "down_block_types": (PLAIN, CROSS, CROSS, PLAIN),
        "up_block_types": (PLAIN_UP, CROSS_UP, CROSS_UP, PLAIN_UP),
        "attention_head_dim": (6, 12, 24, 24),
        "cross_attention_dim": 1280,
        "transformer_layers_per_block": 4,
        "use_linear_projection": True,
    },
}


def sites_of(model):
    """Module path of every self-attention -> channels, from the norm in front of it."""
    blocks = [(n, m) for n, m in model.named_modules() if type(m).__name__ == "BasicTransformerBlock"]
    assert all(not block.only_cross_attention for _, block in blocks)
    return {f"{name}.attn1": block.norm1.normalized_shape[0] for name, block in blocks}


@pytest.mark.parametrize("name", UNETS)
def test_unets(name):
    config = UNETS[name]
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(**config)
    sites = sites_of(model)
    architecture = identify(sites, context_dim=config["cross_attention_dim"])
    assert architecture == name.split()[0]
    if not architecture.startswith("unet-"):
        assert sites == site_channels(architecture)


def test_pixart_sigma():
    with torch.device("meta"):
        model = diffusers.PixArtTransformer2DModel(
            num_layers=28,
            cross_attention_dim=1152,
            caption_channels=4096,
            sample_size=64,
            interpolation_scale=1,
        )
    assert sites_of(model) == site_channels("pixart_sigma")
    assert identify(sites_of(model)) == "pixart_sigma"
