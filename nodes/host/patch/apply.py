"""From a MODEL, trained blocks and the node's settings to the patched clone and what to report."""

from __future__ import annotations

from dataclasses import dataclass

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ....deltaconv_core.errors import DeltaConvError
from ....deltaconv_core.sites import report
from ....deltaconv_core.sites.match import check_heads, matching_sites
from ....deltaconv_core.sites.report import Report
from ....deltaconv_core.sites.sampling_range import SamplingRange
from ....deltaconv_core.weights.checkpoint import HYBRID_KIND, Checkpoint
from ..model.attend import heads_of
from ..model.sites import Sites
from .applied import KEY, AppliedBlocks, blocks_on, with_blocks, without_blocks
from .base_weights import BaseWeights
from .conflicts import conflicts, warn_of_passes, warn_when_sampling


@dataclass(frozen=True)
class PatchSettings:
    """What the user chose.

    Args:
        blocks: the sites, in the language of `deltaconv_core.sites.select`.
        sampling: the part of the sampling in which ΔConv runs.
        base_strength: of the base weights that come with the blocks; None leaves them out.
    """

    blocks: str
    sampling: SamplingRange
    base_strength: float | None


def apply_checkpoint(
    model: ModelPatcher, found: Sites, checkpoint: Checkpoint, settings: PatchSettings
) -> tuple[ModelPatcher, Report]:
    """Puts ΔConv on a clone of the MODEL, in place of one that may be there already.

    Args:
        model: ModelPatcher.
        found: its sites.
        checkpoint: trained blocks (`deltaconv_core.Checkpoint`).
        settings: what the user chose.

    Raises:
        DeltaConvError: the MODEL, the checkpoint and the settings do not go together; nothing was changed.
    """
    chosen = matching_sites(found.architecture, found.channels, checkpoint, settings.blocks, "MODEL")
    sites = {id: found.sites[id] for id in chosen}
    bare = without_blocks(model)
    if checkpoint.mixer == HYBRID_KIND:
        check_heads(checkpoint, {id: heads_of(bare, site) for id, site in sites.items()}, "MODEL")
    clone, patch = with_blocks(bare, sites, checkpoint.blocks, settings.sampling)
    warnings = [*report.assumptions(checkpoint), *conflicts(bare, sites, patch.keeps_projections)]
    base = _base_weights(clone, patch, found, checkpoint, settings.base_strength)
    said = set(warnings)
    clone.add_wrapper_with_key(
        WrappersMP.OUTER_SAMPLE, KEY, warn_when_sampling(sites, patch.keeps_projections, said)
    )
    clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, warn_of_passes(sites, said))
    lines = [report.of_blocks(found.architecture, len(found.sites), patch.blocks)]
    lines += [*report.of_kept(checkpoint.kept), *report.of_range(settings.sampling), *base]
    if blocks_on(model) is not None:
        lines.append("The ΔConv that was on this MODEL before is replaced as a whole.")
    return clone, Report(lines, warnings)


def _base_weights(
    clone: ModelPatcher, patch: AppliedBlocks, found: Sites, checkpoint: Checkpoint, strength: float | None
) -> list[str]:
    count = len(checkpoint.base_weights)
    if not count:
        return []
    try:
        base = BaseWeights(clone, found, checkpoint.base_weights)
    except DeltaConvError as error:
        if strength is not None:
            raise
        return [report.of_unfit_base_weights(count, error)]
    if strength is not None:
        patch.base_weights = base.add_to(clone, strength)
    return [report.of_base_weights(count, base.difference, strength)]
