"""Models of ComfyUI's own classes with random weights, and where their self-attention stands.

Places and sizes come from ComfyUI's map of diffusers names, not from this repository.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .authors_block import Form, conv2d, earlier, release, scaled_noise

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_spatial_transformer": True,
    "use_temporal_attention": False,
    "num_classes": None,
    "adm_in_channels": None,
    "legacy": False,
}
UNET_FORMS = (
    Form("release", release, "simple", prefix="denoiser."),
    Form("Conv2d twin", conv2d, "simple", prefix="unet.", spatial_bias=True),
    Form("earlier block", earlier, "sigmoid", prefix="base_ema:", pooling="bilinear", spatial_bias=True),
)
PIXART_FORMS = (
    Form("release", release, "sigmoid"),
    Form("Conv2d twin", conv2d, "sigmoid", prefix="base_ema:", spatial_bias=True),
    Form("earlier block", earlier, "sigmoid", prefix="base:", pooling="bilinear", spatial_bias=True),
    Form("three stages", release, "sigmoid", prefix="denoiser.", scales=(1.0, 0.5, 1 / 3)),
)


@dataclass(frozen=True)
class Architecture:
    """A model to compare on.

    Args:
        host_class: its name in `comfy.supported_models`.
        config: of the network, as ComfyUI detects it.
        small: changes to the config for a quick comparison.
        kernels: sizes that the authors' release has in every stage ("down_blocks.0", "mid_block", ...); one
            number where all are the same.
        forms: of the authors' files.
        latents: (rows, columns) to run at.
    """

    host_class: str
    config: dict[str, Any]
    small: dict[str, Any]
    kernels: dict[str, int] | int
    forms: tuple[Form, ...]
    latents: tuple[tuple[int, int], ...]

    def sized(self, small: bool) -> dict[str, Any]:
        """The config of the network, a new one each time: ComfyUI consumes its lists."""
        return copy.deepcopy(self.config | (self.small if small else {}))


ARCHITECTURES = {
    "sd15": Architecture(
        "SD15",
        UNET
        | {
            "num_res_blocks": [2, 2, 2, 2],
            "channel_mult": [1, 2, 4, 4],
            "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
            "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
            "transformer_depth_middle": 1,
            "num_heads": 8,
            "num_head_channels": -1,
            "context_dim": 768,
            "use_linear_in_transformer": False,
        },
        {"model_channels": 32, "context_dim": 16},
        {"down_blocks.0": 7, "down_blocks.1": 9, "down_blocks.2": 5, "mid_block": 3}
        | {"up_blocks.1": 5, "up_blocks.2": 9, "up_blocks.3": 11},
        UNET_FORMS,
        ((32, 32), (33, 27)),
    ),
    "sdxl": Architecture(
        "SDXL",
        UNET
        | {
            "num_res_blocks": [2, 2, 2],
            "channel_mult": [1, 2, 4],
            "transformer_depth": [0, 0, 2, 2, 10, 10],
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
            "transformer_depth_middle": 10,
            "num_heads": -1,
            "num_head_channels": 64,
            "context_dim": 2048,
            "use_linear_in_transformer": True,
            "num_classes": "sequential",
            "adm_in_channels": 2816,
        },
        {"model_channels": 32, "num_head_channels": 16, "context_dim": 16, "adm_in_channels": 24},
        {"down_blocks.1": 9, "down_blocks.2": 7, "mid_block": 9, "up_blocks.0": 9, "up_blocks.1": 13},
        UNET_FORMS,
        ((32, 32), (33, 27)),
    ),
    # ComfyUI's PixArt takes even latents only; half of 46 x 38 are odd numbers of tokens.
    "pixart_sigma": Architecture(
        "PixArtSigma",
        {
            "num_heads": 16,
            "patch_size": 2,
            "hidden_size": 1152,
            "in_channels": 4,
            "depth": 28,
            "model_max_length": 300,
            "input_size": 64,
            "pe_interpolation": 1,
            "micro_condition": False,
            "caption_channels": 4096,
        },
        {"num_heads": 4, "hidden_size": 48, "depth": 4, "model_max_length": 8, "caption_channels": 16},
        13,
        PIXART_FORMS,
        ((48, 40), (46, 38)),
    ),
}


@dataclass(frozen=True)
class Place:
    """Where one self-attention stands.

    Args:
        path: of the attention from the network.
        channels: of its tokens.
        kernel_size: of the authors' block there.
        level: how often the latent is halved on the way there.
    """

    path: str
    channels: int
    kernel_size: int
    level: int

    def grid(self, latent: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of its tokens; halving rounds up."""
        return -(-latent[0] >> self.level), -(-latent[1] >> self.level)


def build(architecture: Architecture, small: bool, dtype: torch.dtype = torch.float32) -> Any:
    """A ModelPatcher, its weights such that activations neither explode nor vanish."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    config = getattr(comfy.supported_models, architecture.host_class)(architecture.sized(small))
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "", device=torch.device("cpu"))
    for name, parameter in model.diffusion_model.named_parameters():
        if parameter.ndim == 1:
            value = 0.1 * torch.randn(parameter.shape) + float(name.endswith("weight"))  # norms scale by 1
        else:
            value = scaled_noise(parameter.shape)
        parameter.requires_grad_(False).copy_(value)
    devices = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    patcher_class = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return patcher_class(model, *devices)


def attentions(architecture: Architecture, small: bool) -> dict[str, Place]:
    """Diffusers path of every transformer block -> place of its self-attention."""
    import comfy.utils

    config = architecture.sized(small)
    if isinstance(architecture.kernels, int):
        place = (config["hidden_size"], architecture.kernels, 1)
        return {f"transformer_blocks.{i}": Place(f"blocks.{i}.attn", *place) for i in range(config["depth"])}
    last = len(config["channel_mult"]) - 1
    found = {}
    for name, path in comfy.utils.unet_to_diffusers(config).items():
        block, _, layer = name.partition(".attn1.")
        if layer != "to_q.weight":
            continue
        stage = block.partition(".attentions")[0]
        side, _, number = stage.partition(".")
        level = {"down_blocks": int(number or 0), "up_blocks": last - int(number or 0)}.get(side, last)
        channels = config["model_channels"] * config["channel_mult"][level]
        attention = path.removesuffix(".to_q.weight")
        found[block] = Place(attention, channels, architecture.kernels[stage], level)
    return found


def convolutions(architecture: Architecture, small: bool) -> dict[str, str]:
    """Diffusers name of each weight of the ResNets' first convolutions -> its path from the network."""
    import comfy.utils

    names = comfy.utils.unet_to_diffusers(architecture.sized(small))
    return {name: path for name, path in names.items() if ".resnets." in name and ".conv1." in name}


def make_inputs(architecture: Architecture, small: bool, latent: tuple[int, int]) -> dict[str, Tensor]:
    """What the network is called with."""
    config = architecture.sized(small)
    batch = 2 if small else 1
    inputs = {
        "x": torch.randn(batch, 4, *latent),
        "timesteps": torch.full((batch,), 500.0),
        "context": torch.randn(batch, 8, config.get("context_dim") or config["caption_channels"]),
    }
    if config.get("adm_in_channels"):
        inputs["y"] = torch.randn(batch, config["adm_in_channels"])
    return inputs


@contextmanager
def by_hand(
    network: torch.nn.Module, forwards: dict[str, Callable[..., Tensor]], weights: dict[str, Tensor]
) -> Iterator[None]:
    """The network with functions in place of attentions and with other weights, both named by path."""
    parameters = {path: network.get_parameter(path) for path in weights}
    own = {path: parameter.data for path, parameter in parameters.items()}
    for path, forward in forwards.items():
        network.get_submodule(path).forward = forward
    for path, parameter in parameters.items():
        parameter.data = weights[path]
    try:
        yield
    finally:
        for path in forwards:
            del network.get_submodule(path).forward
        for path, parameter in parameters.items():
            parameter.data = own[path]
