"""What stands as `forward` of a replaced self-attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import DeltaConvError
from ..sites.sampling_range import Choice, answer
from .applied import AppliedBlocks
from .hooks import CHOICE, GRID, without


@dataclass(frozen=True, eq=False)
class MixerForward:
    """ΔConv on every call."""

    site: str
    blocks: AppliedBlocks

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **call: Any,
    ) -> Tensor:
        return self.mix(hidden_states, encoder_hidden_states, attention_mask, call)

    def mix(self, x: Tensor, others: Tensor | None, mask: Tensor | None, call: dict[str, Any]) -> Tensor:
        """The block's answer to a call of the attention."""
        if others is not None or (mask is not None and not self.blocks.keeps_projections):
            what = "tokens other than the picture's own" if mask is None else "a mask"
            raise DeltaConvError(
                f"the self-attention {self.site} was called with {what}, which ΔConv cannot attend to; leave "
                "it out with `blocks`, or call the model without"
            )
        return self.blocks.run(self.site, x, self.told(GRID, call), mask)

    def told(self, key: str, call: dict[str, Any]) -> Any:
        """What the hooks handed down for this call."""
        if key not in call:
            raise DeltaConvError(
                f"something calls the self-attention {self.site} past the model's own forward, so height, "
                "width and timestep are not known; call the model, or take ΔConv off with `remove`"
            )
        return call[key]


@dataclass(frozen=True, eq=False)
class RangedForward(MixerForward):
    """ΔConv in a part of the sampling, the attention's own forward outside it."""

    attention: Callable[..., Tensor]

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **call: Any,
    ) -> Tensor:
        choice: Choice = self.told(CHOICE, call)
        return answer(
            choice if isinstance(choice, bool) else choice.to(hidden_states.device),
            mixer=lambda: self.mix(hidden_states, encoder_hidden_states, attention_mask, call),
            attention=lambda: self.attention(
                hidden_states, encoder_hidden_states, attention_mask, **without(call)
            ),
        )
