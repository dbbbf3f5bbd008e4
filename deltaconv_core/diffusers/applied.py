"""The blocks on one model, and all that `remove` needs to know."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from ..block import DeltaConvBlock

NAME = "deltaconv"


class AppliedBlocks(nn.Module):
    """A child of the patched model, so that the blocks go wherever the model goes.

    It follows `.to()`, `.half()` and offloading, but its weights are none of the model's: they do not appear
    among its parameters nor in its state dict, and saving the model does not write them.

    Args:
        blocks: site id -> block.
        attentions: site id -> the attention that the block stands in for.
    """

    def __init__(self, blocks: Mapping[str, DeltaConvBlock], attentions: Mapping[str, nn.Module]) -> None:
        super().__init__()
        # Modules in a plain dict are not registered.
        self.blocks = dict(blocks)
        self.attentions = dict(attentions)
        self.forwards: dict[str, Any] = {}
        """Site id -> the `forward` that was set on the attention before; None: it had its class's."""
        self.handles: list[RemovableHandle] = []
        self.originals: dict[str, Tensor] = {}
        """Parameter name -> what the model had there before base weights were put in."""

    def run(self, site: str, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, H * W, C) -> (B, H * W, C) of the block at a site."""
        block = self.blocks[site]
        y: Tensor
        if block.conv_up.weight.device == x.device:
            y = block(x, grid)
            return y
        # Offloading layer by layer leaves the blocks where they are stored; they run from copies.
        weights = {name: weight.to(x.device) for name, weight in block.named_parameters()}
        y = functional_call(block, weights, (x, grid))
        return y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AppliedBlocks:
        with torch.no_grad():
            for block in self.blocks.values():
                block._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-any-return,no-untyped-call]

    def extra_repr(self) -> str:
        """What it holds, for printing."""
        return f"{len(self.blocks)} blocks"


def blocks_on(model: nn.Module) -> AppliedBlocks | None:
    """The ΔConv on this model, if any."""
    return cast("AppliedBlocks | None", model._modules.get(NAME))
