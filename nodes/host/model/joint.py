"""Joint attention of text and image: where it stands in ComfyUI's DiTs, and where the image is in it.

These models are only looked at; ΔConv cannot stand in for an attention that also serves the text. Names are
those of the diffusers library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.lumina.model import NextDiT
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

Keywords = dict[str, Any]


@dataclass
class Tokens:
    """What is known of the tokens during one call of the network.

    Args:
        grid: (H, W) of the image.
        text: how many tokens of text a block has stated; blocks that do not say come after those that do.
    """

    grid: tuple[int, int]
    text: int = 0

    @property
    def image(self) -> int:
        return self.grid[0] * self.grid[1]


# (args and keyword arguments of the module's forward, number of queries, tokens) -> place of the image
Locate = Callable[[tuple[Any, ...], Keywords, int, Tokens], slice]


@dataclass(frozen=True)
class JointSite:
    """One module whose forward holds an attention, or several.

    Args:
        ids: diffusers names of its attentions, in the order in which it calls them.
        path: attribute path of the module from ComfyUI's BaseModel.
        channels: C of its tokens.
        locate: says where the image is among the tokens.
    """

    ids: tuple[str, ...]
    path: str
    channels: int
    locate: Locate


@dataclass
class JointSites:
    """The joint attentions of one network.

    Args:
        architecture: name of the model family.
        patch_size: side of a token in latents.
        sites: in the order of the network.
    """

    architecture: str
    patch_size: int
    sites: list[JointSite] = field(default_factory=list)

    @property
    def channels(self) -> dict[str, int]:
        return {id: site.channels for site in self.sites for id in site.ids}

    def tokens(self, x: torch.Tensor) -> Tokens:
        """The image's tokens for latents (B, C, ..., H, W), which the network pads to whole patches."""
        height, width = (-(-side // self.patch_size) for side in x.shape[-2:])
        return Tokens((height, width))


def find_joint_sites(network: torch.nn.Module) -> JointSites | None:
    """The joint attentions of a network; None for networks of other families."""
    for kind, read in (
        (Flux, _flux),
        (MMDiT, _sd3),
        (NextDiT, _lumina),
        (QwenImageTransformer2DModel, _qwen),
    ):
        if isinstance(network, kind):
            return read(network)
    return None


def _flux(network: Flux) -> JointSites:
    found, channels = JointSites("flux", network.patch_size), network.hidden_size
    for i in range(len(network.double_blocks)):
        path = f"diffusion_model.double_blocks.{i}"
        found.sites.append(
            JointSite((f"transformer_blocks.{i}.attn",), path, channels, _after_keyword("txt"))
        )
    for i in range(len(network.single_blocks)):
        path = f"diffusion_model.single_blocks.{i}"
        found.sites.append(JointSite((f"single_transformer_blocks.{i}.attn",), path, channels, _after_text))
    return found


def _sd3(network: MMDiT) -> JointSites:
    found = JointSites("sd3", network.patch_size)
    for i, block in enumerate(network.joint_blocks):
        ids = [f"transformer_blocks.{i}.attn"]
        if block.x_block.x_block_self_attn:
            ids.append(f"transformer_blocks.{i}.attn2")  # of the image alone
        path = f"diffusion_model.joint_blocks.{i}"
        found.sites.append(JointSite(tuple(ids), path, network.hidden_size, _after_context))
    return found


def _lumina(network: NextDiT) -> JointSites:
    found = JointSites("lumina2", network.patch_size)
    locate = _at_the_end(getattr(network, "pad_tokens_multiple", None))  # older versions never pad
    for part in ("noise_refiner", "layers"):
        for i in range(len(getattr(network, part))):
            path = f"diffusion_model.{part}.{i}.attention"
            found.sites.append(JointSite((f"{part}.{i}.attn",), path, network.dim, locate))
    return found


def _qwen(network: QwenImageTransformer2DModel) -> JointSites:
    found = JointSites("qwen_image", network.patch_size)
    for i in range(len(network.transformer_blocks)):
        id = f"transformer_blocks.{i}.attn"
        locate = _after_keyword("encoder_hidden_states")
        found.sites.append(JointSite((id,), f"diffusion_model.{id}", network.inner_dim, locate))
    return found


def _after_keyword(name: str) -> Locate:
    """Text first, and the block is given it under this name; reference pictures may follow the image."""

    def locate(args: tuple[Any, ...], call: Keywords, queries: int, tokens: Tokens) -> slice:
        tokens.text = call[name].shape[1]
        return _after_text(args, call, queries, tokens)

    return locate


def _after_text(args: tuple[Any, ...], call: Keywords, queries: int, tokens: Tokens) -> slice:
    return slice(tokens.text, tokens.text + tokens.image)


def _after_context(args: tuple[Any, ...], call: Keywords, queries: int, tokens: Tokens) -> slice:
    """SD3: a block is called with (text, image); its second attention has the image alone."""
    start = args[0].shape[1] if queries > tokens.image else 0
    return slice(start, start + tokens.image)


def _at_the_end(padded_to: int | None) -> Locate:
    """The image comes last, filled up to a multiple."""

    def locate(args: tuple[Any, ...], call: Keywords, queries: int, tokens: Tokens) -> slice:
        start = queries - tokens.image - (-tokens.image % (padded_to or 1))
        return slice(start, start + tokens.image)

    return locate
