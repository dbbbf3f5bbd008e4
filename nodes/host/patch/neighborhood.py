"""Neighborhood attention on a clone of a MODEL: its own projections, and a window around every query."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ....deltaconv_core.errors import DeltaConvError
from ....deltaconv_core.mixers.neighborhood import check_kernel_size, neighborhood_attention
from ....deltaconv_core.sites import select
from ....deltaconv_core.sites.sampling_range import SamplingRange
from ..model.attend import intercepted
from ..model.sites import Site, find_sites
from ..model.standing import check_reach
from ..report import Report
from . import site_patch
from .conflicts import foreign_forward, name_of
from .current_call import current_call, grid_at
from .forwards import MixerForward
from .site_patch import REMEDY, SitePatch, forward_key


class NeighborhoodPatch(SitePatch):
    """Neighborhood attention on a MODEL: the attention's own forward runs, with other keys for each query."""

    key = "deltaconv_neighborhood"
    keeps_projections = True


@dataclass(frozen=True, eq=False)
class NeighborhoodForward:
    """Stands as `forward` of an attention."""

    site: Site
    kernel_size: int
    owner: object

    def __call__(self, x: torch.Tensor, *args: Any, **call: Any) -> torch.Tensor:
        grid = grid_at(self.owner, self.site, x, call)

        def attend(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
        ) -> torch.Tensor:
            if mask is not None:
                raise DeltaConvError(
                    f"something masks the self-attention at {self.site.id}; ΔConv Neighborhood Attention has "
                    "a mask of its own and takes no other: leave this site out with the input `blocks`"
                )
            return neighborhood_attention(q, k, v, grid, self.kernel_size)

        run = current_call(self.owner, "take ΔConv Neighborhood Attention off this MODEL")
        return intercepted(run.own[self.site.path], attend)(x, *args, **call)


def add_neighborhood(model: ModelPatcher, kernel_size: int, blocks: str) -> tuple[ModelPatcher, Report]:
    """A clone of the MODEL whose self-attention looks at K x K tokens around every query only.

    Args:
        model: ModelPatcher.
        kernel_size: K, odd.
        blocks: the sites, in the language of `deltaconv_core.sites.select`.

    Raises:
        DeltaConvError: a MODEL without sites, a selection that names none, an even kernel size, or something
            else on the MODEL that keeps this from being taken off again.
    """
    check_kernel_size(kernel_size)
    found = find_sites(model)
    sites = [found.sites[id] for id in select(blocks, found.sites)]
    check_reach(model, (site.path for site in sites), REMEDY)
    clone = model.clone()
    keys = map(forward_key, sites)
    covered = {key: clone.object_patches[key] for key in keys if key in clone.object_patches}
    patch = NeighborhoodPatch({site.id: site for site in sites}, SamplingRange(), covered)
    for site in sites:
        forward = NeighborhoodForward(site, kernel_size, patch.owner)
        clone.add_object_patch(forward_key(site), forward)
    site_patch.put_on(clone, patch)
    line = (
        f"Neighborhood attention, {kernel_size} x {kernel_size} tokens, at {len(sites)} of "
        f"{len(found.sites)} self-attentions of {found.architecture}."
    )
    return clone, Report([line], _covered(model, sites))


def _covered(model: ModelPatcher, sites: Iterable[Site]) -> list[str]:
    before = [forward for site in sites if (forward := foreign_forward(model, site)) is not None]
    if not before:
        return []
    names = {"ΔConv" if isinstance(forward, MixerForward) else name_of(forward) for forward in before}
    return [
        f"{', '.join(sorted(names))} stood at {len(before)} of these sites; neighborhood attention runs "
        "there in its place"
    ]
