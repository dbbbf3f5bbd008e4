"""Where the self-attention of a ComfyUI MODEL stands, under diffusers' names.

U-Nets are read by structure, so any widths, depths and numbers of levels will do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.ldm.modules.attention import BasicTransformerBlock, SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, UNetModel, Upsample
from comfy.ldm.pixart.pixartms import PixArtMS
from comfy.model_patcher import ModelPatcher

from ....deltaconv_core.errors import DeltaConvError
from ....deltaconv_core.sites import identify
from ....deltaconv_core.sites.choose_specs import ModelShape
from ....deltaconv_core.util.wrappers import inside
from . import grids
from .standing import own_modules


@dataclass(frozen=True)
class Site:
    """One self-attention.

    Args:
        id: diffusers module path.
        path: attribute path of the attention from ComfyUI's BaseModel.
        channels: C of its tokens.
        grid_of: gives (H, W) from the tokens and the keyword arguments of one call.
        block: ComfyUI's name of the transformer block for attn1 replace patches; None where it has none.
    """

    id: str
    path: str
    channels: int
    grid_of: Callable[[torch.Tensor, dict[str, Any]], tuple[int, int]]
    block: tuple[str, int, int] | None = None


@dataclass
class Sites:
    """What `find_sites` saw.

    Args:
        sites: site id -> Site, in the order of the network.
        convolutions: diffusers module path of a ResNet's conv1 -> path of the layer from ComfyUI's BaseModel.
        context_dim: width of the text embedding, where the host says it.
    """

    sites: dict[str, Site] = field(default_factory=dict)
    convolutions: dict[str, str] = field(default_factory=dict)
    context_dim: int | None = None

    @property
    def architecture(self) -> str:
        return identify(self.channels, self.context_dim)

    @property
    def shape(self) -> ModelShape:
        """What blocks are chosen by."""
        ups = {int(name.split(".")[1]) for name in self.convolutions if name.startswith("up_blocks")}
        return ModelShape(self.architecture, self.channels, max(ups, default=-1) + 1)

    @property
    def channels(self) -> dict[str, int]:
        return {id: site.channels for id, site in self.sites.items()}


def network_of(model: ModelPatcher) -> torch.nn.Module:
    """The network of a ModelPatcher, out of `torch.compile`'s wrapper, which some nodes put in its place."""
    return inside(model.get_model_object("diffusion_model"))


def uncompiled(model: ModelPatcher) -> ModelPatcher:
    """A ModelPatcher that calls its network without the wrapper around it; itself where there is none."""
    network = network_of(model)
    if network is model.get_model_object("diffusion_model"):
        return model
    clone = model.clone()
    clone.add_object_patch("diffusion_model", network)
    return clone


def find_sites(model: ModelPatcher) -> Sites:
    """The sites of a ModelPatcher.

    Raises:
        DeltaConvError: a model without any, or with a network inside of another node's.
    """
    network = network_of(model)
    found = Sites()
    with own_modules(model):
        if isinstance(network, UNetModel):
            found.context_dim = model.model.model_config.unet_config.get("context_dim")
            _read_unet(network, found)
        elif isinstance(network, PixArtMS):
            _read_pixart(network, found)
    if not found.sites:
        _refuse_wrapped(network)
        raise DeltaConvError(
            f"this MODEL ({type(model.model).__name__}, {type(network).__name__}) has no self-attention that "
            "ΔConv can stand in for; it works on U-Nets with spatial self-attention (SD 1.x, SD 2.x, SDXL, "
            "...) and PixArt, and as joint mixers, which ΔConv Convert Model makes, on FLUX, Chroma, SD 3, "
            "Lumina 2, Z-Image and Qwen-Image"
        )
    return found


def _refuse_wrapped(network: torch.nn.Module) -> None:
    wrapped = next((one for one in network.modules() if isinstance(one, (UNetModel, PixArtMS))), network)
    if wrapped is not network:
        raise DeltaConvError(
            f"the network of this MODEL ({type(wrapped).__name__}) stands inside {type(network).__name__}, "
            "which another node put around it and ΔConv cannot look through: put ΔConv before that node"
        )


def _read_unet(network: UNetModel, found: Sites) -> None:
    middle = [] if network.middle_block is None else [network.middle_block]
    _read_blocks(network.input_blocks, "input", "input_blocks.{}", "down_blocks.{}", found)
    _read_blocks(middle, "middle", "middle_block", "mid_block", found)
    _read_blocks(network.output_blocks, "output", "output_blocks.{}", "up_blocks.{}", found)


def _read_blocks(blocks: Any, side: str, host_name: str, diffusers_name: str, found: Sites) -> None:
    for number, position, stage, resnet, layer in _walk(blocks):
        path = f"diffusion_model.{host_name.format(number)}.{position}"
        name = diffusers_name.format(stage)
        if isinstance(layer, ResBlock):
            # in_layers: norm, activation, convolution
            found.convolutions[f"{name}.resnets.{resnet}.conv1"] = f"{path}.in_layers.2"
            continue
        for depth, block in enumerate(map(inside, layer.transformer_blocks)):
            if isinstance(block, BasicTransformerBlock) and not block.disable_self_attn:
                id = f"{name}.attentions.{resnet}.transformer_blocks.{depth}.attn1"
                channels = block.norm1.normalized_shape[-1]
                attention = f"{path}.transformer_blocks.{depth}.attn1"
                found.sites[id] = Site(id, attention, channels, grids.of_unet, (side, number, depth))


def _walk(blocks: Any) -> Iterator[tuple[int, int, int, int, Any]]:
    """(block number, position in it, stage, ResNet number in the stage, layer) of ResNets and transformers.

    A stage ends where the size changes: at the Downsample or Upsample, or the ResNet that does its work.
    """
    stage, resnet = 0, -1
    for number, block in enumerate(blocks):
        for position, layer in enumerate(block):
            if isinstance(layer, (Downsample, Upsample)) or (isinstance(layer, ResBlock) and layer.updown):
                stage, resnet = stage + 1, -1
            elif isinstance(layer, ResBlock):
                resnet += 1
                yield number, position, stage, resnet, layer
            elif isinstance(layer, SpatialTransformer):
                yield number, position, stage, resnet, layer


def _read_pixart(network: PixArtMS, found: Sites) -> None:
    grid_of = grids.of_patches(network.patch_size)
    blocks: list[Any] = [inside(block) for block in network.blocks]
    for number, block in enumerate(blocks):
        id, width = f"transformer_blocks.{number}.attn1", block.hidden_size
        found.sites[id] = Site(id, f"diffusion_model.blocks.{number}.attn", width, grid_of)
