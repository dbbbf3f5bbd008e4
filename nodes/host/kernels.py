"""Which ΔConvBlock is to learn which self-attention."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace

from ...deltaconv_core.errors import DeltaConvError
from ...deltaconv_core.sites import ARCHITECTURES, release_specs, select
from ...deltaconv_core.spec import BlockSpec
from .sites import Sites

AUTO = "auto"
COARSE, MIDDLE, FINE = 5, 9, 11
TRANSFORMER = 13


def block_specs(found: Sites, chosen: Iterable[str], kernel_sizes: str) -> dict[str, BlockSpec]:
    """The specs of the blocks for the chosen sites.

    Args:
        found: the sites of the MODEL.
        chosen: ids of those to be learned.
        kernel_sizes: "auto", one odd number for all, or a JSON object of site patterns and odd numbers, of
            which the last that fits counts; sites that none fits get "auto".

    Raises:
        DeltaConvError: anything else.
    """
    specs = automatic(found)
    for pattern, size in _wanted(kernel_sizes).items():
        for id in select(pattern, specs):
            specs[id] = replace(specs[id], kernel_size=size)
    return {id: specs[id] for id in chosen}


def automatic(found: Sites) -> dict[str, BlockSpec]:
    """The authors' blocks for models that they published some for, else blocks of like sizes.

    Their SD 1.5 has small kernels where the grid is coarse. So a U-Net of another shape gets 5 in the middle
    and at the lowest level that has attention, 9 one above, and 11 above that; a transformer gets 13 as
    PixArt has.
    """
    if found.architecture in ARCHITECTURES:
        return release_specs(found.architecture)
    if found.architecture.startswith("dit"):
        return {id: BlockSpec(n, TRANSFORMER, gate="sigmoid") for id, n in found.channels.items()}
    levels = {id: _level(id, found) for id in found.channels}
    lowest = max((level for level in levels.values() if level is not None), default=0)
    by_height = {None: COARSE, 0: COARSE, 1: MIDDLE}
    heights = {id: None if level is None else lowest - level for id, level in levels.items()}
    return {id: BlockSpec(n, by_height.get(heights[id], FINE)) for id, n in found.channels.items()}


def _level(id: str, found: Sites) -> int | None:
    """0 is the level of the picture itself; None is the middle block."""
    if id.startswith("mid_block"):
        return None
    side, number, *_ = id.split(".")
    if side == "down_blocks":
        return int(number)
    return max(int(name.split(".")[1]) for name in found.convolutions if name.startswith(side)) - int(number)


def _wanted(kernel_sizes: str) -> Mapping[str, int]:
    if kernel_sizes.strip() == AUTO:
        return {}
    try:
        wanted = json.loads(kernel_sizes)
    except (ValueError, RecursionError):
        wanted = None
    if isinstance(wanted, int):
        wanted = {"all": wanted}
    if not isinstance(wanted, dict) or not all(type(size) is int for size in wanted.values()):
        raise DeltaConvError(
            f"expected kernel_sizes to be 'auto', an odd number such as 9, or JSON such as "
            f'{{"down": 7, "mid_block": 5}}, got {kernel_sizes!r}'
        )
    return wanted
