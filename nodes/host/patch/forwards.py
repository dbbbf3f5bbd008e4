"""What stands as `forward` of a replaced attention: plain callables; a Module would join the base model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ....deltaconv_core.sites.sampling_range import answer
from ..model.attend import intercepted
from ..model.sites import Site
from .current_call import current_call


@dataclass(frozen=True, eq=False)
class MixerForward:
    """ΔConv on every call."""

    site: Site
    block: torch.nn.Module

    def __call__(self, x: torch.Tensor, *args: Any, **call: Any) -> torch.Tensor:
        return self.block(x, grid=self.site.grid_of(x, call))


@dataclass(frozen=True, eq=False)
class RangedForward(MixerForward):
    """ΔConv in a part of the sampling, the attention's own forward outside it."""

    owner: object

    def __call__(self, x: torch.Tensor, *args: Any, **call: Any) -> torch.Tensor:
        run = current_call(self.owner, "set start_percent to 0 and end_percent to 1")
        return answer(
            run.choice,
            mixer=lambda: self.block(x, grid=self.site.grid_of(x, call)),
            attention=lambda: run.attention[self.site.path](x, *args, **call),
        )


@dataclass(frozen=True, eq=False)
class HybridForward(MixerForward):
    """A hybrid mixer between the attention's own projections, in all of the sampling or a part of it."""

    owner: object

    def __call__(self, x: torch.Tensor, *args: Any, **call: Any) -> torch.Tensor:
        run = current_call(self.owner, "sample it with a sampler, or take ΔConv off this MODEL")
        attention = run.attention[self.site.path]

        def mixed() -> torch.Tensor:
            grid = self.site.grid_of(x, call)
            return intercepted(attention, partial(self._between, grid))(x, *args, **call)

        return answer(run.choice, mixer=mixed, attention=lambda: attention(x, *args, **call))

    def _between(
        self,
        grid: tuple[int, int],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        return self.block(q, k, v, grid, mask)
