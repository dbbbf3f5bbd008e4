"""All that is known of the architectures, and what a site's name says about it.

A site id is the diffusers module path of the attention, whatever the host: `transformer_blocks.7.attn1`,
`down_blocks.0.attentions.1.transformer_blocks.0.attn1`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ..block.spec import BlockSpec
from ..errors import DeltaConvError

HEAD_CHANNELS = 64
PATCH_LEVEL = 1  # a transformer's tokens are patches of 2 x 2

# Site id -> short name. The last three are of models with joint attention, which are only looked at.
SHORT_NAMES = (
    (r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.transformer_blocks\.(\d+)\.attn1", r"\1\2.\3.\4"),
    (r"mid_block\.attentions\.\d+\.transformer_blocks\.(\d+)\.attn1", r"mid.\1"),
    (r"transformer_blocks\.(\d+)\.attn1?", r"\1"),
    (r"single_transformer_blocks\.(\d+)\.attn", r"single\1"),
    (r"noise_refiner\.(\d+)\.attn", r"noise\1"),
    (r"layers\.(\d+)\.attn", r"\1"),
)


@dataclass(frozen=True)
class Level:
    """One level of a U-Net: channels, transformer blocks of each attention, the authors' kernel size."""

    channels: int
    depths: tuple[int, ...] = ()
    kernel_size: int = 0


@dataclass(frozen=True)
class UNet:
    """A U-Net as diffusers numbers it: its levels in the order of down_blocks, mid_block, up_blocks.

    Args:
        down, mid, up: the levels.
        context_dim: width of the text embedding.
        heads: of every attention; 0: one for each 64 channels.
    """

    down: tuple[Level, ...]
    mid: Level
    up: tuple[Level, ...]
    context_dim: int
    heads: int = 0


@dataclass(frozen=True)
class Transformer:
    """A stack of equal blocks (PixArt)."""

    channels: int
    depth: int
    kernel_size: int
    heads: int


def _stable_diffusion(context_dim: int, heads: int = 0) -> UNet:
    return UNet(
        down=(Level(320, (1, 1), 7), Level(640, (1, 1), 9), Level(1280, (1, 1), 5), Level(1280)),
        mid=Level(1280, (1,), 3),
        up=(Level(1280), Level(1280, (1, 1, 1), 5), Level(640, (1, 1, 1), 9), Level(320, (1, 1, 1), 11)),
        context_dim=context_dim,
        heads=heads,
    )


# Shapes from the models' published configurations; kernel sizes from the authors' code, and for the models
# that they have none for (sd21, ssd1b) those of the nearest one that they have some for.
ARCHITECTURES: dict[str, UNet | Transformer] = {
    "sd15": _stable_diffusion(context_dim=768, heads=8),
    "sd21": _stable_diffusion(context_dim=1024),
    "sdxl": UNet(
        down=(Level(320), Level(640, (2, 2), 9), Level(1280, (10, 10), 7)),
        mid=Level(1280, (10,), 9),
        up=(Level(1280, (10, 10, 10), 9), Level(640, (2, 2, 2), 13), Level(320)),
        context_dim=2048,
    ),
    "ssd1b": UNet(
        down=(Level(320), Level(640, (2, 2), 9), Level(1280, (4, 4), 7)),
        mid=Level(1280),
        up=(Level(1280, (4, 4, 10), 9), Level(640, (2, 1, 1), 13), Level(320)),
        context_dim=2048,
    ),
    "pixart_sigma": Transformer(channels=1152, depth=28, kernel_size=13, heads=16),
}


def site_channels(architecture: str) -> dict[str, int]:
    """Site id -> channels of a known architecture, in the order of the network.

    Raises:
        DeltaConvError: an unknown architecture.
    """
    return {site: channels for site, (channels, _) in _sites(architecture).items()}


def authors_specs(architecture: str) -> dict[str, BlockSpec]:
    """Site id -> the block that the authors have (or would have) there.

    Raises:
        DeltaConvError: an unknown architecture.
    """
    return {
        site: BlockSpec(channels, kernel_size, gate=authors_gate(site))
        for site, (channels, kernel_size) in _sites(architecture).items()
    }


def authors_gate(site: str) -> str:
    """The gate of the authors' block at a site."""
    return "sigmoid" if is_transformer(site) else "simple"


def known_heads(architecture: str, channels: int) -> int:
    """Heads of a self-attention in a known architecture."""
    return ARCHITECTURES[architecture].heads or channels // HEAD_CHANNELS


def is_transformer(site: str) -> bool:
    """Whether a site stands in a stack of equal blocks, not in a U-Net."""
    return site.startswith("transformer_blocks.")


def part_of(site: str) -> str:
    """The part of the network that a site is in: "down_blocks.1", "mid_block", "transformer_blocks"."""
    first, second, *_ = site.split(".")
    return f"{first}.{second}" if first in ("down_blocks", "up_blocks") else first


def level_of(site: str, levels: int) -> int:
    """How often height and width of the latent are halved on the way to a site.

    Args:
        site: its id.
        levels: of the U-Net, those without attention included; means nothing for a transformer.
    """
    if is_transformer(site):
        return PATCH_LEVEL
    side, _, number = part_of(site).partition(".")
    if side == "mid_block":
        return levels - 1
    return int(number) if side == "down_blocks" else levels - 1 - int(number)


def short_name(site: str) -> str:
    """`down_blocks.1.attentions.0.transformer_blocks.0.attn1` is "down1.0", its next block "down1.0.1"."""
    for pattern, short in SHORT_NAMES:
        if match := re.fullmatch(pattern, site):
            name = match.expand(short)
            return name.removesuffix(".0") if name.count(".") == 2 or name == "mid.0" else name
    return site


def identify(sites: Mapping[str, int], context_dim: int | None = None) -> str:
    """The architecture with exactly these sites.

    SD 1.x and SD 2.x have the same sites; only the width of the text context tells them apart, and without it
    the answer is "sd15".

    Args:
        sites: site id -> channels.
        context_dim: width of the text embedding that enters a U-Net's cross-attention, if known.

    Returns:
        A known name, else one made of the shape: "unet-64x3-128x5" has 3 sites of 64 channels and 5 of 128.

    Raises:
        DeltaConvError: no sites.
    """
    if not sites:
        raise DeltaConvError(
            "this model has no self-attention that ΔConv can stand in for; choose a U-Net or PixArt"
        )
    for name, shape in ARCHITECTURES.items():
        fits = context_dim is None or isinstance(shape, Transformer) or context_dim == shape.context_dim
        if fits and dict(sites) == site_channels(name):
            return name
    kind = "dit" if all(is_transformer(site) for site in sites) else "unet"
    counts = sorted(Counter(sites.values()).items())
    return "-".join([kind, *(f"{channels}x{count}" for channels, count in counts)])


def _sites(architecture: str) -> dict[str, tuple[int, int]]:
    """Site id -> (channels, the authors' kernel size)."""
    shape = ARCHITECTURES.get(architecture)
    if shape is None:
        raise DeltaConvError(f"unknown architecture {architecture!r}; known are {', '.join(ARCHITECTURES)}")
    if isinstance(shape, Transformer):
        return {
            f"transformer_blocks.{i}.attn1": (shape.channels, shape.kernel_size) for i in range(shape.depth)
        }
    levels = {f"down_blocks.{i}": level for i, level in enumerate(shape.down)}
    levels["mid_block"] = shape.mid
    levels |= {f"up_blocks.{i}": level for i, level in enumerate(shape.up)}
    return {
        f"{path}.attentions.{i}.transformer_blocks.{j}.attn1": (level.channels, level.kernel_size)
        for path, level in levels.items()
        for i, depth in enumerate(level.depths)
        for j in range(depth)
    }
