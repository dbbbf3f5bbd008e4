"""Whether weights fit a MODEL; where they do not, both sides are named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ...deltaconv_core.errors import DeltaConvError
from ...deltaconv_core.sites import select
from .sites import Site, Sites


def matching_sites(found: Sites, checkpoint: Any, selection: str) -> dict[str, Site]:
    """The selected sites of the MODEL, for each of which the checkpoint has a block of the right size.

    Args:
        found: the sites of the MODEL.
        checkpoint: trained blocks (`deltaconv_core.Checkpoint`).
        selection: in the language of `deltaconv_core.sites.select`.

    Raises:
        DeltaConvError: another architecture, other channels, sites that only one of the two has, or a
        selection that
            names no site.
    """
    chosen = select(selection, found.sites)
    trained = {id: block.spec.dim for id, block in checkpoint.blocks.items()}
    differences = _differences(trained, found.channels)
    if differences or checkpoint.architecture != found.architecture:
        raise DeltaConvError(
            f"the weights are for {_describe(checkpoint.architecture, trained)}, but this MODEL is "
            f"{_describe(found.architecture, found.channels)}{differences}; choose weights made for this "
            "model"
        )
    missing = [id for id in chosen if id not in trained]
    if missing:
        raise DeltaConvError(
            f"the weights have blocks for {len(trained)} of the {len(found.sites)} sites of this MODEL "
            f"({found.architecture}) and none for {_some(missing)}; choose other weights, or leave those "
            "sites out with the input `blocks`"
        )
    return {id: found.sites[id] for id in chosen}


def _differences(trained: Mapping[str, int], model: Mapping[str, int]) -> str:
    """What no selection could mend."""
    extra = [id for id in trained if id not in model]
    other = [f"{id} ({n}, in the MODEL {model[id]})" for id, n in trained.items() if model.get(id, n) != n]
    text = f"; the MODEL has no {_some(extra)}" if extra else ""
    return text + (f"; channels differ at {_some(other)}" if other else "")


def _describe(architecture: str, channels: Mapping[str, int]) -> str:
    counts = ", ".join(
        f"{count} of {width} channels" for width, count in sorted(Counter(channels.values()).items())
    )
    return f"{architecture} ({len(channels)} sites: {counts})"


def _some(names: Iterable[str], limit: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
