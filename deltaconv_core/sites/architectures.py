"""Self-attention sites: their names, the known architectures, and the language that selects some of them.

A site id is the diffusers module path of the attention, whatever the host: `transformer_blocks.7.attn1`,
`down_blocks.0.attentions.1.transformer_blocks.0.attn1`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..block.spec import BlockSpec
from ..errors import DeltaConvError

PARTS = {"down": "down_blocks.*", "mid": "mid_block.*", "up": "up_blocks.*"}


@dataclass(frozen=True)
class Level:
    """One level of a U-Net: channels, transformer blocks of each attention, the authors' kernel size."""

    channels: int
    depths: tuple[int, ...] = ()
    kernel_size: int = 0


@dataclass(frozen=True)
class UNet:
    """A U-Net as diffusers numbers it: its levels in the order of down_blocks, mid_block, up_blocks."""

    down: tuple[Level, ...]
    mid: Level
    up: tuple[Level, ...]
    context_dim: int


@dataclass(frozen=True)
class Transformer:
    """A stack of equal blocks (PixArt)."""

    channels: int
    depth: int
    kernel_size: int


def _stable_diffusion(context_dim: int) -> UNet:
    return UNet(
        down=(Level(320, (1, 1), 7), Level(640, (1, 1), 9), Level(1280, (1, 1), 5), Level(1280)),
        mid=Level(1280, (1,), 3),
        up=(Level(1280), Level(1280, (1, 1, 1), 5), Level(640, (1, 1, 1), 9), Level(320, (1, 1, 1), 11)),
        context_dim=context_dim,
    )


# Shapes from the models' published configurations; kernel sizes from the authors' code, and for the models
# that they have none for (sd21, ssd1b) those of the nearest one that they have some for.
ARCHITECTURES: dict[str, UNet | Transformer] = {
    "sd15": _stable_diffusion(context_dim=768),
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
    "pixart_sigma": Transformer(channels=1152, depth=28, kernel_size=13),
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
    gate = "sigmoid" if isinstance(ARCHITECTURES.get(architecture), Transformer) else "simple"
    return {site: BlockSpec(channels, k, gate=gate) for site, (channels, k) in _sites(architecture).items()}


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
        raise DeltaConvError("this model has no self-attention site that a ΔConvBlock can replace")
    for name, shape in ARCHITECTURES.items():
        fits = context_dim is None or isinstance(shape, Transformer) or context_dim == shape.context_dim
        if fits and dict(sites) == site_channels(name):
            return name
    kind = "dit" if all(site.startswith("transformer_blocks.") for site in sites) else "unet"
    counts = sorted(Counter(sites.values()).items())
    return "-".join([kind, *(f"{channels}x{count}" for channels, count in counts)])


def select(pattern: str, site_ids: Iterable[str]) -> tuple[str, ...]:
    """The sites that a block selection names.

    Args:
        pattern: comma list of "all", "down", "mid", "up", site ids, their beginnings up to a dot, globs of
            either (`up_blocks.*`, `*.transformer_blocks.0`). A leading "-" excludes; exclusions alone start
            from all.
        site_ids: the ids to choose from.

    Returns:
        The chosen ids in the order given.

    Raises:
        DeltaConvError: a part that matches no id, or a selection of nothing.
    """
    ids = tuple(site_ids)
    parts = [part.strip() for part in pattern.split(",") if part.strip()]
    wanted = [part for part in parts if not part.startswith("-")]
    unwanted = [part[1:].strip() for part in parts if part.startswith("-")]
    chosen = _matches(wanted, ids) if wanted or not unwanted else set(ids)
    chosen -= _matches(unwanted, ids)
    if not chosen:
        raise DeltaConvError(
            f"the block selection {pattern!r} selects nothing; use 'all' or some of: {_listing(ids)}"
        )
    return tuple(site for site in ids if site in chosen)


def _matches(parts: Iterable[str], ids: tuple[str, ...]) -> set[str]:
    found: set[str] = set()
    for part in parts:
        glob = "*" if part == "all" else PARTS.get(part, part)
        hits = {site for site in ids if fnmatchcase(site, glob) or fnmatchcase(site, f"{glob}.*")}
        if not hits:
            raise DeltaConvError(
                f"the block selection {part!r} matches no site; use all, down, mid, up or: {_listing(ids)}"
            )
        found |= hits
    return found


def _listing(ids: tuple[str, ...], limit: int = 16) -> str:
    return ", ".join(ids) if len(ids) <= limit else f"{', '.join(ids[:limit])}, ... ({len(ids)} in all)"


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
