"""ΔConv on a clone of a MODEL: weightless `forward` patches at the sites, and a patcher for the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ....deltaconv_core.sites.sampling_range import SamplingRange
from ....deltaconv_core.weights.checkpoint import DELTACONV_KIND
from ..model.sites import Site
from ..model.standing import check_reach
from . import site_patch
from .base_weights import remove_base_weights
from .blocks import PatcherKind, build_blocks, build_blocks_again, kind_of_patcher, network_dtype, own_patcher
from .forwards import HybridForward, MixerForward, RangedForward
from .site_patch import REMEDY, SitePatch, forward_key

if TYPE_CHECKING:
    from typing_extensions import Self

KEY = "deltaconv"


class AppliedBlocks(SitePatch):
    """What ΔConv put on a MODEL; ComfyUI loads the blocks whenever it loads the MODEL.

    Args:
        patcher: ModelPatcher of the blocks.
        sites: the replaced sites, by id, in the order of the blocks.
        sampling, covered: see `SitePatch`.
    """

    key = KEY

    def __init__(
        self,
        patcher: ModelPatcher,
        sites: Mapping[str, Site],
        sampling: SamplingRange,
        covered: Mapping[str, Any],
    ) -> None:
        super().__init__(sites, sampling, covered)
        self.patcher = patcher
        self.base_weights: dict[str, Any] = {}
        """ComfyUI's key -> weight patch that came with the blocks."""
        self._patchers = WeakValueDictionary[PatcherKind, ModelPatcher]({kind_of_patcher(patcher): patcher})
        """Of the same blocks, for clones that need others; shared by all clones."""

    def models(self) -> list[ModelPatcher]:
        return [*super().models(), self.patcher]

    def for_clone(self, clone: ModelPatcher) -> Self:
        """With blocks of its own where the clone runs on another device, or keeps weights in another way."""
        own = super().for_clone(clone)
        kind = kind_of_patcher(clone)
        if kind == kind_of_patcher(self.patcher):
            return own
        own.patcher = self._patchers.get(kind)
        if own.patcher is None:
            blocks = build_blocks_again(self.sites, self.patcher)
            own.patcher = self._patchers[kind] = own_patcher(blocks, clone)
        for site, block in zip(self.sites.values(), own.blocks, strict=True):
            key = forward_key(site)
            forward = clone.object_patches.get(key)
            if isinstance(forward, MixerForward) and forward.owner is self.owner:
                clone.add_object_patch(key, replace(forward, block=block))
        return own

    @property
    def blocks(self) -> torch.nn.ModuleList:
        return self.patcher.model.blocks

    @property
    def keeps_projections(self) -> bool:
        """Whether the attentions' own layers still run, and what changes them still acts."""
        return any(block.kind != DELTACONV_KIND for block in self.blocks)


def with_blocks(
    model: ModelPatcher, sites: Mapping[str, Site], trained: Mapping[str, Any], sampling: SamplingRange
) -> tuple[ModelPatcher, AppliedBlocks]:
    """A clone of the MODEL in which the blocks stand at the sites, and the patch that is on it.

    Args:
        model: ModelPatcher without ΔConv (see `without_blocks`).
        sites: the sites to replace, by id.
        trained: site id -> DeltaConvBlock or HybridMixer, at least for these sites.
        sampling: the part of the sampling in which they run.

    Raises:
        DeltaConvError: something else on the MODEL keeps ΔConv from being taken off again.
    """
    check_reach(model, (site.path for site in sites.values()), REMEDY)
    clone = model.clone()
    blocks = build_blocks({id: trained[id] for id in sites}, network_dtype(model))
    keys = {id: forward_key(site) for id, site in sites.items()}
    covered = {key: clone.object_patches[key] for key in keys.values() if key in clone.object_patches}
    patch = AppliedBlocks(own_patcher(blocks, model), sites, sampling, covered)
    forward = MixerForward if sampling.is_everything else RangedForward
    if patch.keeps_projections:
        forward = HybridForward
    for id, site in sites.items():
        clone.add_object_patch(keys[id], forward(site, blocks[id], patch.owner))
    return clone, site_patch.put_on(clone, patch)


def blocks_on(model: ModelPatcher) -> AppliedBlocks | None:
    """The ΔConv on this MODEL, if any."""
    patches = site_patch.patches_of(model, KEY)
    return patches[-1] if patches else None


def without_blocks(model: ModelPatcher) -> ModelPatcher:
    """A clone of the MODEL without ΔConv; the MODEL itself where it has none."""
    patch = blocks_on(model)
    if patch is None:
        return model
    clone = model.clone()
    for site in patch.sites.values():
        if isinstance(clone.object_patches.get(forward_key(site)), MixerForward):
            del clone.object_patches[forward_key(site)]
    clone.object_patches |= {
        key: obj for key, obj in patch.covered.items() if key not in clone.object_patches
    }
    site_patch.take_off(clone, KEY)
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.CALC_COND_BATCH):
        clone.remove_wrappers_with_key(kind, KEY)
    remove_base_weights(clone, patch.base_weights)
    return clone
