"""Joint attention of text and image: where it stands in ComfyUI's DiTs, and where the image is in it.

Joint mixers (`deltaconv_core.mixers.joint`) can stand in here, which leave the text exact; ΔConv blocks
cannot. Names are those of the diffusers library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.ldm.chroma.model import Chroma
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
        frames: how many such images there are one after the other.
        text: how many tokens of text a block has stated; blocks that do not say come after those that do.
    """

    grid: tuple[int, int]
    frames: int = 1
    text: int | None = None

    @property
    def image(self) -> int:
        return self.frames * self.grid[0] * self.grid[1]


# (args and keyword arguments of the module's forward, number of queries, tokens) -> place of the image; None
# where the host has not said it
Locate = Callable[[tuple[Any, ...], Keywords, int, Tokens], slice | None]


@dataclass(frozen=True)
class JointSite:
    """One module whose forward holds an attention, or several.

    Args:
        ids: diffusers names of its attentions, in the order in which it calls them.
        path: attribute path of the module from ComfyUI's BaseModel.
        channels: C of its tokens.
        heads: of its queries.
        locate: says where the image is among the tokens.
        states_text: whether blocks after it know from its call how many tokens of text there are.
    """

    ids: tuple[str, ...]
    path: str
    channels: int
    heads: int
    locate: Locate
    states_text: bool = False

    @property
    def id(self) -> str:
        """Of the module among others."""
        return self.ids[0]

    def id_of(self, queries: int, tokens: Tokens) -> str:
        """Of the attention that has so many queries: only a second one in a block is of the image alone."""
        return self.ids[-1] if queries == tokens.image else self.ids[0]

    @property
    def block(self) -> None:
        """There are no attn1 replace patches for it."""
        return None


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

    @property
    def heads(self) -> dict[str, int]:
        return {id: site.heads for site in self.sites for id in site.ids}

    @property
    def of_image_alone(self) -> list[str]:
        """Ids of the attentions that a block has beside that of text and image."""
        return [id for site in self.sites for id in site.ids[1:]]

    def tokens(self, x: torch.Tensor) -> Tokens:
        """The image's tokens for latents (B, C, ..., H, W), which the network pads to whole patches."""
        height, width = (-(-side // self.patch_size) for side in x.shape[-2:])
        return Tokens((height, width), x.shape[2] if x.ndim == 5 else 1)


def find_joint_sites(network: torch.nn.Module) -> JointSites | None:
    """The joint attentions of a network; None for networks of other families."""
    for kind, read in (
        (Flux, _flux),
        (Chroma, _chroma),
        (MMDiT, _sd3),
        (NextDiT, _lumina),
        (QwenImageTransformer2DModel, _qwen),
    ):
        if isinstance(network, kind):
            return read(network)
    return None


def _flux(network: Flux | Chroma, family: str = "flux") -> JointSites:
    found, channels = JointSites(family, network.patch_size), network.hidden_size
    heads = network.num_heads
    for i in range(len(network.double_blocks)):
        path = f"diffusion_model.double_blocks.{i}"
        ids = (f"transformer_blocks.{i}.attn",)
        found.sites.append(JointSite(ids, path, channels, heads, _after_keyword("txt"), states_text=True))
    for i in range(len(network.single_blocks)):
        path = f"diffusion_model.single_blocks.{i}"
        found.sites.append(
            JointSite((f"single_transformer_blocks.{i}.attn",), path, channels, heads, _after_text)
        )
    return found


def _chroma(network: Chroma) -> JointSites:
    """Also Chroma Radiance, whose patches are of pixels."""
    return _flux(network, "chroma")


def _sd3(network: MMDiT) -> JointSites:
    found = JointSites("sd3", network.patch_size)
    for i, block in enumerate(network.joint_blocks):
        ids = [f"transformer_blocks.{i}.attn"]
        if block.x_block.x_block_self_attn:
            ids.append(f"transformer_blocks.{i}.attn2")  # of the image alone
        path = f"diffusion_model.joint_blocks.{i}"
        heads = block.x_block.attn.num_heads
        found.sites.append(JointSite(tuple(ids), path, network.hidden_size, heads, _after_context))
    return found


def _lumina(network: NextDiT) -> JointSites:
    found = JointSites("lumina2", network.patch_size)
    locate = _at_the_end(getattr(network, "pad_tokens_multiple", None))  # older versions never pad
    for part in ("noise_refiner", "layers"):
        for i in range(len(getattr(network, part))):
            path = f"diffusion_model.{part}.{i}.attention"
            found.sites.append(JointSite((f"{part}.{i}.attn",), path, network.dim, network.n_heads, locate))
    return found


def _qwen(network: QwenImageTransformer2DModel) -> JointSites:
    found = JointSites("qwen_image", network.patch_size)
    for i in range(len(network.transformer_blocks)):
        id = f"transformer_blocks.{i}.attn"
        locate = _after_keyword("encoder_hidden_states")
        heads = network.transformer_blocks[i].attn.heads
        found.sites.append(JointSite((id,), f"diffusion_model.{id}", network.inner_dim, heads, locate))
    return found


def _after_keyword(name: str) -> Locate:
    """Text first, and the block is given it under this name; reference pictures may follow the image."""

    def locate(args: tuple[Any, ...], call: Keywords, queries: int, tokens: Tokens) -> slice | None:
        tokens.text = call[name].shape[1]
        return _after_text(args, call, queries, tokens)

    return locate


def _after_text(args: tuple[Any, ...], call: Keywords, queries: int, tokens: Tokens) -> slice | None:
    return None if tokens.text is None else slice(tokens.text, tokens.text + tokens.image)


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
