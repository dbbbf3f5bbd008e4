"""Which ΔConvBlock is to learn which self-attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..block.spec import BlockSpec
from ..errors import DeltaConvError
from ..locality.recommend import Recommendation
from ..util.foreign_json import parse_json
from ..util.text import quoted
from .architectures import ARCHITECTURES, authors_gate, authors_specs, is_transformer, level_of, part_of
from .selection import select

AUTO = "auto"
LEAN, AUTHORS = FORMS = ("lean", "released")
COARSE, MIDDLE, FINE = 5, 9, 11
TRANSFORMER = 13


@dataclass(frozen=True)
class ModelShape:
    """What the choice depends on.

    Args:
        architecture: of the model.
        channels: site id -> channels.
        levels: of a U-Net, those without attention included; 0 for a transformer.
    """

    architecture: str
    channels: Mapping[str, int]
    levels: int = 0


def block_specs(
    shape: ModelShape, chosen: Iterable[str], kernel_sizes: str, form: str = LEAN
) -> dict[str, BlockSpec]:
    """The specs of the blocks for the chosen sites.

    Args:
        shape: of the model.
        chosen: ids of those to be learned.
        kernel_sizes: "auto", one odd number for all, or a JSON object of site patterns and odd numbers, of
            which the last that fits counts; sites that none fits get "auto". Or the JSON text of a
            `locality.Recommendation`, whose `skip` sites are left out.
        form: "lean", `BlockSpec.lean` | "released", blocks such as the authors'.

    Raises:
        DeltaConvError: anything else, or nothing left to be learned.
    """
    if form not in FORMS:
        raise DeltaConvError(f"expected the blocks' form to be one of {', '.join(FORMS)}, got {form!r}")
    specs = automatic(shape)
    if form == LEAN:
        specs = {id: BlockSpec.lean(spec.dim, spec.kernel_size) for id, spec in specs.items()}
    wanted = _wanted(kernel_sizes)
    chosen = tuple(chosen)
    if "kind" in wanted:
        advice = Recommendation.from_json(kernel_sizes)
        _check(advice, shape)
        specs |= {id: replace(specs[id], kernel_size=size) for id, size in advice.kernel_sizes.items()}
        return {id: specs[id] for id in _without(advice.skip, chosen)}
    for pattern, size in wanted.items():
        for id in select(pattern, specs):
            specs[id] = replace(specs[id], kernel_size=size)
    return {id: specs[id] for id in chosen}


def automatic(shape: ModelShape) -> dict[str, BlockSpec]:
    """The authors' blocks for models that they have some for, else blocks of like sizes.

    Their SD 1.5 has small kernels where the grid is coarse. So a U-Net of another shape gets 5 in the middle
    and at the lowest level that has attention, 9 one above, and 11 above that; a transformer gets 13 as
    PixArt has.
    """
    if shape.architecture in ARCHITECTURES:
        return authors_specs(shape.architecture)
    sizes = _kernel_sizes(shape)
    return {id: BlockSpec(n, sizes[id], gate=authors_gate(id)) for id, n in shape.channels.items()}


def _kernel_sizes(shape: ModelShape) -> dict[str, int]:
    if all(is_transformer(id) for id in shape.channels):
        return dict.fromkeys(shape.channels, TRANSFORMER)
    levels = {id: level_of(id, shape.levels) for id in shape.channels if part_of(id) != "mid_block"}
    lowest = max(levels.values(), default=0)
    by_height = {0: COARSE, 1: MIDDLE}
    sizes = {id: by_height.get(lowest - level, FINE) for id, level in levels.items()}
    return {id: sizes.get(id, COARSE) for id in shape.channels}


def _wanted(kernel_sizes: str) -> Mapping[str, Any]:
    """Site patterns and sizes; a recommendation's fields as they are."""
    if kernel_sizes.strip() == AUTO:
        return {}
    try:
        wanted = parse_json(kernel_sizes)
    except ValueError:
        wanted = None
    if type(wanted) is int:
        wanted = {"all": wanted}
    if isinstance(wanted, dict) and "kind" in wanted:
        return wanted
    if not isinstance(wanted, dict) or not all(type(size) is int for size in wanted.values()):
        raise DeltaConvError(
            f"expected kernel_sizes to be 'auto', an odd number such as 9, JSON such as "
            f'{{"down": 7, "mid_block": 5}}, or the JSON of a recommendation, got {quoted(kernel_sizes, 200)}'
        )
    return wanted


def _check(advice: Recommendation, shape: ModelShape) -> None:
    if advice.architecture != shape.architecture:
        raise DeltaConvError(
            f"the recommendation is for {advice.architecture}, but this model is {shape.architecture}; look "
            "at this model's own attention, or take 'auto'"
        )
    unknown = [id for id in (*advice.kernel_sizes, *advice.skip) if id not in shape.channels]
    if unknown:
        raise DeltaConvError(
            f"the recommendation has {len(unknown)} sites that this model does not, first {unknown[0]}; make "
            "it again from this model"
        )


def _without(skip: Iterable[str], chosen: tuple[str, ...]) -> tuple[str, ...]:
    left_out = set(skip)
    kept = tuple(id for id in chosen if id not in left_out)
    if not kept:
        raise DeltaConvError(
            f"the recommendation leaves all {len(chosen)} chosen sites alone, so there is nothing to learn; "
            "choose other blocks, allow larger kernels in the recommendation, or take 'auto'"
        )
    return kept
