"""What runs at a replaced attention: its `forward`, and the layers of the block that it calls.

A forward is a plain callable; a Module would join the base model.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.ops
import torch

from ....deltaconv_core.sites.sampling_range import answer
from ..model.attend import intercepted
from ..model.sites import Site
from .current_call import current_call, grid_at

# Newer versions of ComfyUI want to know when cast weights are no longer used.
TAKES_WEIGHTS_BACK = "offloadable" in inspect.signature(comfy.ops.cast_bias_weight).parameters


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
        return self.block(x, grid=self.grid_of(x, call))

    def grid_of(self, x: torch.Tensor, call: dict[str, Any]) -> tuple[int, int]:
        """(H, W) of the tokens x (B, N, C); with gradients, a layer that runs again has the same."""
        if torch.is_grad_enabled():
            return grid_at(self.owner, self.site, x, call)
        return self.site.grid_of(x, call)


class RangedForward(MixerForward):
    """ΔConv in a part of the sampling; outside it, what stood there before."""

    def __call__(self, x: torch.Tensor, *args: Any, **call: Any) -> torch.Tensor:
        run = current_call(self.owner, "set start_percent to 0 and end_percent to 1")
        return answer(
            run.choice,
            mixer=lambda: self.block(x, grid=self.grid_of(x, call)),
            attention=lambda: run.behind[self.site.path](x, *args, **call),
        )


class HybridForward(MixerForward):
    """A hybrid mixer between the attention's own projections, in all of the sampling or a part of it."""

    def __call__(self, x: torch.Tensor, *args: Any, **call: Any) -> torch.Tensor:
        run = current_call(self.owner, "sample it with a sampler, or take ΔConv off this MODEL")

        def mixed() -> torch.Tensor:
            grid = self.grid_of(x, call)
            own = run.own[self.site.path]
            return intercepted(own, partial(self._between, grid))(x, *args, **call)

        return answer(run.choice, mixer=mixed, attention=lambda: run.behind[self.site.path](x, *args, **call))

    def _between(
        self,
        grid: tuple[int, int],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        return self.block(q, k, v, grid, mask)


class BorrowedWeights:
    """A layer's weights as its own forward would use them for an input like x: moved, cast, and patched.

    ComfyUI may take them back at the end.
    """

    def __init__(self, layer: torch.nn.Module, x: torch.Tensor) -> None:
        self.layer, self.x = layer, x

    def __enter__(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        if hasattr(comfy.ops, "run_every_op"):
            comfy.ops.run_every_op()  # where the user's interruption is noticed
        if not TAKES_WEIGHTS_BACK:
            return comfy.ops.cast_bias_weight(self.layer, self.x)
        self.lent = comfy.ops.cast_bias_weight(self.layer, self.x, offloadable=True)
        return self.lent[0], self.lent[1]

    def __exit__(self, *error: object) -> None:
        if TAKES_WEIGHTS_BACK:
            comfy.ops.uncast_bias_weight(self.layer, *self.lent)


class LendsWeights:
    """A castable layer whose weights can be used without calling it; see `deltaconv_core.block.steps`."""

    def lend_weights(self: Any, x: torch.Tensor) -> BorrowedWeights:
        return BorrowedWeights(self, x)


class Layers:
    """The `operations` of a block in ComfyUI."""

    class Linear(LendsWeights, comfy.ops.manual_cast.Linear):
        pass

    class Conv2d(LendsWeights, comfy.ops.manual_cast.Conv2d):
        pass
