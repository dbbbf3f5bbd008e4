"""From a MODEL, trained blocks and the node's settings to the patched clone and what to tell the user."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from comfy.patcher_extension import WrappersMP

from ...deltaconv_core.errors import DeltaConvError
from ...deltaconv_core.switch import SamplingRange
from .base_weights import BaseWeights
from .conflicts import conflicts, warn_when_sampling
from .match import matching_sites
from .patch import KEY, DeltaConvPatch, add_patch, find_patch, without_patch
from .report import Report
from .sites import Sites, find_sites


@dataclass(frozen=True)
class Settings:
    """What the user chose.

    Args:
        blocks: the sites, in the language of `deltaconv_core.sites.select`.
        sampling: the part of the sampling in which ΔConv runs.
        base_strength: of the base weights that come with the blocks; None leaves them out.
    """

    blocks: str
    sampling: SamplingRange
    base_strength: float | None


def apply_checkpoint(model: Any, checkpoint: Any, settings: Settings) -> tuple[Any, Report]:
    """Puts ΔConv on a clone of the MODEL, in place of one that may be there already.

    Args:
        model: ModelPatcher.
        checkpoint: trained blocks (`deltaconv_core.Checkpoint`).
        settings: what the user chose.

    Raises:
        DeltaConvError: the MODEL, the checkpoint and the settings do not go together; nothing was changed.
    """
    found = find_sites(model)
    sites = matching_sites(found, checkpoint, settings.blocks)
    bare = without_patch(model)
    warnings = [*assumptions(checkpoint), *conflicts(bare, sites)]
    clone, patch = add_patch(bare, sites, checkpoint.blocks, settings.sampling)
    base = _base_weights(clone, patch, found, checkpoint, settings.base_strength)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, warn_when_sampling(sites, warnings))
    lines = [_what(found, patch), *_where(settings.sampling), *base]
    if find_patch(model) is not None:
        lines.append("The ΔConv that was on this MODEL before is replaced as a whole.")
    return clone, Report(lines, warnings)


def assumptions(checkpoint: Any) -> list[str]:
    """What the file did not tell and was guessed when it was read."""
    return [checkpoint.metadata["assumed"]] if "assumed" in checkpoint.metadata else []


def _what(found: Sites, patch: DeltaConvPatch) -> str:
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in patch.dtypes)
    return (
        f"ΔConv stands in for {len(patch.sites)} of {len(found.sites)} self-attentions of "
        f"{found.architecture} ({patch.num_parameters / 1e6:.3g} M parameters, {dtypes})."
    )


def _where(sampling: SamplingRange) -> Iterable[str]:
    if not sampling.is_everything:
        yield f"It runs from {sampling.start:.1%} to {sampling.end:.1%} of the sampling, attention outside."


def _base_weights(
    clone: Any, patch: DeltaConvPatch, found: Sites, checkpoint: Any, strength: float | None
) -> Iterable[str]:
    if not checkpoint.base_weights:
        return []
    what = f"Base weights: {len(checkpoint.base_weights)} tensors of ResNet convolutions"
    try:
        base = BaseWeights(clone, found, checkpoint.base_weights)
    except DeltaConvError as error:
        if strength is not None:
            raise
        return [f"{what}, left out; they do not fit: {error}."]
    if strength is None:
        return [f"{what}, left out; they are {base.difference()}."]
    patch.base_weights = base.add_to(clone, strength)
    return [f"{what}, applied with strength {strength:g} at every step; they are {base.difference()}."]
