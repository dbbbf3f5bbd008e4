"""Whether weights fit a model; where they do not, both sides are named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..errors import DeltaConvError
from ..util.text import listing
from .selection import select


def matching_sites(
    architecture: str, channels: Mapping[str, int], checkpoint: Any, selection: str, model: str = "model"
) -> tuple[str, ...]:
    """The selected sites of a model, for each of which the checkpoint has a block of the right size.

    Sites of which the checkpoint says that attention stays there (`Checkpoint.kept`) are left out.

    Args:
        architecture: of the model.
        channels: site id -> channels of the model.
        checkpoint: trained blocks (`Checkpoint`).
        selection: in the language of `sites.select`.
        model: what the host calls its models, for messages.

    Raises:
        DeltaConvError: no block, another architecture, other channels, sites that only one of the two has, or
            a selection that names no site.
    """
    if not checkpoint.blocks:
        raise DeltaConvError(
            "the weights hold no block, as after a conversion that leaves all attention; convert at a larger "
            f"size, or allow larger errors, or use the {model} without weights"
        )
    chosen = select(selection, channels)
    trained = {id: block.spec.dim for id, block in checkpoint.blocks.items()}
    differences = _differences(trained, channels, model)
    if differences or checkpoint.architecture != architecture:
        raise DeltaConvError(
            f"the weights are for {_describe(checkpoint.architecture, trained)}, but this {model} is "
            f"{_describe(architecture, channels)}{differences}; choose weights made for this {model.lower()}"
        )
    missing = [id for id in chosen if id not in trained and id not in checkpoint.kept]
    if missing:
        raise DeltaConvError(
            f"the weights have blocks for {len(trained)} of the {len(channels)} sites of this {model} "
            f"({architecture}) and none for {listing(missing)}; choose other weights, or leave those "
            "sites out with `blocks`"
        )
    replaced = tuple(id for id in chosen if id in trained)
    if not replaced:
        raise DeltaConvError(
            f"the weights leave the attention at all of the selected sites, {listing(chosen)}: "
            f"{checkpoint.kept[chosen[0]]}; choose others with `blocks`"
        )
    return replaced


def check_heads(checkpoint: Any, heads: Mapping[str, int], model: str = "model") -> None:
    """Checks that mixers have the heads of the attentions that they stand between the projections of.

    Args:
        checkpoint: hybrid or joint mixers (`Checkpoint`).
        heads: site id -> heads of the attention there, of the sites where they are to stand.
        model: what the host calls its models, for messages.

    Raises:
        DeltaConvError: another number of heads somewhere.
    """
    for id, count in heads.items():
        own = checkpoint.blocks[id].spec.heads
        if own != count:
            raise DeltaConvError(
                f"the weights are of {own} heads at {id}, but the attention of this {model} has {count} "
                f"there; choose weights fitted to this {model.lower()} or to one that it is a fine-tune of"
            )


def _differences(trained: Mapping[str, int], own: Mapping[str, int], model: str) -> str:
    """What no selection can resolve."""
    extra = [id for id in trained if id not in own]
    other = [f"{id} ({n}, in the {model} {own[id]})" for id, n in trained.items() if own.get(id, n) != n]
    text = f"; the {model} has no {listing(extra)}" if extra else ""
    return text + (f"; channels differ at {listing(other)}" if other else "")


def _describe(architecture: str, channels: Mapping[str, int]) -> str:
    counts = ", ".join(
        f"{count} of {width} channels" for width, count in sorted(Counter(channels.values()).items())
    )
    return f"{architecture} ({len(channels)} sites: {counts})"
