"""ΔConv on a clone of a MODEL: weightless `forward` patches at the sites, and a patcher for the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from ....deltaconv_core.sites.sampling_range import SamplingRange
from ....deltaconv_core.weights.checkpoint import HYBRID
from ..model.sites import Site
from . import base_weights
from .blocks import build_blocks, network_dtype, own_patcher
from .current_call import watch_calls
from .forwards import HybridForward, MixerForward, RangedForward

KEY = "deltaconv"


class AppliedBlocks:
    """What ΔConv put on a MODEL; travels among its patches, so ComfyUI loads the blocks whenever the MODEL.

    Args:
        patcher: ModelPatcher of the blocks.
        sites: the replaced sites, by id.
    """

    def __init__(self, patcher: Any, sites: Mapping[str, Site]) -> None:
        self.patcher = patcher
        self.sites = dict(sites)
        self.base_weights: dict[str, Any] = {}
        """ComfyUI's key -> weight patch that came with the blocks."""
        self.covered: dict[str, Any] = {}
        """Object patches of others that the MODEL had at the same places."""

    def models(self) -> list[Any]:
        return [self.patcher]

    def to(self, device_or_dtype: Any) -> AppliedBlocks:
        return self

    def __deepcopy__(self, memo: dict) -> AppliedBlocks:
        # Up to ComfyUI 0.12, cloning a MODEL deep-copies its options; that would load the blocks once per
        # clone.
        return self

    @property
    def blocks(self) -> torch.nn.ModuleList:
        return self.patcher.model.blocks

    @property
    def keeps_projections(self) -> bool:
        """Whether the attentions' own layers still run, and what changes them still acts."""
        return any(block.kind == HYBRID for block in self.blocks)


def with_blocks(
    model: Any, sites: Mapping[str, Site], trained: Mapping[str, Any], sampling: SamplingRange
) -> tuple[Any, AppliedBlocks]:
    """A clone of the MODEL in which the blocks stand at the sites, and the patch that is on it.

    Args:
        model: ModelPatcher without ΔConv (see `without_blocks`).
        sites: the sites to replace, by id.
        trained: site id -> DeltaConvBlock or HybridMixer, at least for these sites.
        sampling: the part of the sampling in which they run.
    """
    clone = model.clone()
    blocks = build_blocks({id: trained[id] for id in sites}, network_dtype(model))
    patch = AppliedBlocks(own_patcher(blocks, model), sites)
    clone.set_model_patch(patch, KEY)
    for id, site in sites.items():
        key = f"{site.path}.forward"
        if key in clone.object_patches:
            patch.covered[key] = clone.object_patches[key]
        if patch.keeps_projections:
            forward = HybridForward(site, blocks[id], patch)
        elif sampling.is_everything:
            forward = MixerForward(site, blocks[id])
        else:
            forward = RangedForward(site, blocks[id], patch)
        clone.add_object_patch(key, forward)
    if patch.keeps_projections or not sampling.is_everything:
        paths = [site.path for site in sites.values()]
        wrapper = watch_calls(patch, sampling, paths, needs_attention=patch.keeps_projections)
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, wrapper)
    return clone, patch


def blocks_on(model: Any) -> AppliedBlocks | None:
    """The ΔConv on this MODEL, if any."""
    patches = model.model_options["transformer_options"].get("patches", {}).get(KEY, [])
    return patches[-1] if patches else None


def without_blocks(model: Any) -> Any:
    """A clone of the MODEL without ΔConv; the MODEL itself where it has none."""
    patch = blocks_on(model)
    if patch is None:
        return model
    clone = model.clone()
    del clone.model_options["transformer_options"]["patches"][KEY]
    for site in patch.sites.values():
        key = f"{site.path}.forward"
        if isinstance(clone.object_patches.get(key), MixerForward):
            del clone.object_patches[key]
    clone.object_patches |= {
        key: obj for key, obj in patch.covered.items() if key not in clone.object_patches
    }
    for kind in (WrappersMP.APPLY_MODEL, WrappersMP.OUTER_SAMPLE):
        clone.remove_wrappers_with_key(kind, KEY)
    base_weights.remove(clone, patch.base_weights)
    return clone
