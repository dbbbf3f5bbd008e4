"""Neighborhood attention on a clone of a MODEL: its own projections, and a window around every query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from ....deltaconv_core.errors import DeltaConvError
from ....deltaconv_core.mixers.neighborhood import check_kernel_size, neighborhood_attention
from ....deltaconv_core.sites import select
from ....deltaconv_core.sites.sampling_range import SamplingRange
from ..model.attend import intercepted
from ..model.sites import Site, find_sites
from ..report import Report
from .current_call import current_call, watch_calls
from .forwards import MixerForward

KEY = "deltaconv_neighborhood"


@dataclass(frozen=True, eq=False)
class NeighborhoodForward:
    """Stands as `forward` of an attention."""

    site: Site
    kernel_size: int
    owner: object

    def __call__(self, x: torch.Tensor, *args: Any, **call: Any) -> torch.Tensor:
        grid = self.site.grid_of(x, call)

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
        return intercepted(run.attention[self.site.path], attend)(x, *args, **call)


def add_neighborhood(model: Any, kernel_size: int, blocks: str) -> tuple[Any, Report]:
    """A clone of the MODEL whose self-attention looks at K x K tokens around every query only.

    Args:
        model: ModelPatcher.
        kernel_size: K, odd.
        blocks: the sites, in the language of `deltaconv_core.sites.select`.

    Raises:
        DeltaConvError: a MODEL without sites, a selection that names none, or an even kernel size.
    """
    check_kernel_size(kernel_size)
    found = find_sites(model)
    sites = [found.sites[id] for id in select(blocks, found.sites)]
    clone, owner = model.clone(), object()
    keys = [f"{site.path}.forward" for site in sites]
    covered = [key for key in keys if isinstance(clone.object_patches.get(key), MixerForward)]
    for key, site in zip(keys, sites, strict=True):
        clone.add_object_patch(key, NeighborhoodForward(site, kernel_size, owner))
    wrapper = watch_calls(owner, SamplingRange(), [site.path for site in sites], needs_attention=True)
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, wrapper)
    line = (
        f"Neighborhood attention, {kernel_size} x {kernel_size} tokens, at {len(sites)} of "
        f"{len(found.sites)} self-attentions of {found.architecture}."
    )
    return clone, Report([line], _covered(covered))


def _covered(keys: list[str]) -> list[str]:
    if not keys:
        return []
    return [f"ΔConv stood at {len(keys)} of these sites; neighborhood attention runs there in its place"]
