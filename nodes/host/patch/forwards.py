"""What stands as `forward` of a replaced attention: plain callables; a Module would join the base model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ....deltaconv_core.sites.sampling_range import answer
from ..model.attend import intercepted
from ..model.sites import Site
from .current_call import current_call, grid_at


@dataclass(frozen=True, eq=False)
class MixerForward:
    """ΔConv on every call.

    Args:
        site: where it stands.
        block: the mixer there.
        owner: of the calls that it may ask about (see `current_call`).
    """

    site: Site
    block: torch.nn.Module
    owner: object = None

    def __call__(self, x: torch.Tensor, *args: Any, **call: Any) -> torch.Tensor:
        return self.block(x, grid=grid_at(self.owner, self.site, x, call))


class RangedForward(MixerForward):
    """ΔConv in a part of the sampling; outside it, what stood there before."""

    def __call__(self, x: torch.Tensor, *args: Any, **call: Any) -> torch.Tensor:
        run = current_call(self.owner, "set start_percent to 0 and end_percent to 1")
        return answer(
            run.choice,
            mixer=lambda: self.block(x, grid=grid_at(self.owner, self.site, x, call)),
            attention=lambda: run.behind[self.site.path](x, *args, **call),
        )


class HybridForward(MixerForward):
    """A hybrid mixer between the attention's own projections, in all of the sampling or a part of it."""

    def __call__(self, x: torch.Tensor, *args: Any, **call: Any) -> torch.Tensor:
        run = current_call(self.owner, "sample it with a sampler, or take ΔConv off this MODEL")

        def mixed() -> torch.Tensor:
            grid = grid_at(self.owner, self.site, x, call)
            own = run.own[self.site.path]
            return intercepted(own, partial(self._between, grid))(x, *args, **call)

        behind = run.behind.get(self.site.path)
        return answer(run.choice, mixer=mixed, attention=lambda: behind(x, *args, **call))

    def _between(
        self,
        grid: tuple[int, int],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        return self.block(q, k, v, grid, mask)
