"""What ΔConv is on a model: for everybody to ask, and all that `remove` needs to know."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from ..block.spec import BlockSpec
from ..mixers.hybrid import HybridMixer, HybridSpec
from ..mixers.joint import JointSpec
from .projections import mixed
from .sites import network_of

NAME = "deltaconv"


@dataclass(frozen=True)
class Applied:
    """What `apply` did to a model, as it stands.

    Args:
        architecture: of the model.
        mixer: what stands there, "deltaconv", "hybrid" or "joint".
        specs: site id -> what the mixer there is made of, in the order of the network.
        start_percent, end_percent: the part of the sampling in which the blocks run, attention outside.
        base_weights: names of the model's parameters that base weights were put into.
        base_weights_strength: how far, from 0, the model's own, to 1, the file's.
        source: the file or folder that all this was read from; None where a Checkpoint was given.
        metadata: of the checkpoint: teacher, training settings, license, ...
    """

    architecture: str
    mixer: str
    specs: dict[str, BlockSpec] | dict[str, HybridSpec] | dict[str, JointSpec]
    start_percent: float
    end_percent: float
    base_weights: tuple[str, ...]
    base_weights_strength: float
    source: str | None
    metadata: dict[str, str]


class AppliedBlocks(nn.Module):
    """A child of the patched model, so that the blocks go wherever the model goes.

    It follows `.to()`, `.half()` and offloading, but its weights are none of the model's: they do not appear
    among its parameters nor in its state dict, and saving the model does not write them.

    Args:
        blocks: site id -> DeltaConvBlock, HybridMixer or JointMixer.
        attentions: site id -> the attention that the block stands in for.
        about: what was done, for `applied`.
    """

    def __init__(
        self, blocks: Mapping[str, Any], attentions: Mapping[str, nn.Module], about: Applied
    ) -> None:
        super().__init__()
        self.about = about
        # Modules in a plain dict are not registered.
        self.blocks = dict(blocks)
        self.attentions = dict(attentions)
        self.forwards: dict[str, Any] = {}
        """Site id -> the `forward` that was set on the attention before; None: it had its class's."""
        self.handles: list[RemovableHandle] = []
        self.originals: dict[str, Tensor] = {}
        """Parameter name -> what the model had there before base weights were put in."""

    @property
    def keeps_projections(self) -> bool:
        """Whether the attentions' own layers still run, and what changes them still acts."""
        return any(isinstance(block, HybridMixer) for block in self.blocks.values())

    def run(self, site: str, x: Tensor, grid: tuple[int, int], mask: Tensor | None = None) -> Tensor:
        """(B, H * W, C) -> (B, H * W, C) of the block at a site.

        Args:
            mask: of the keys, as the attention is given it; for hybrid mixers alone.
        """
        block = self.blocks[site]
        if isinstance(block, HybridMixer):
            keys = None if mask is None else mask.reshape(len(x), -1)
            return mixed(self.attentions[site], x, lambda q, k, v: block(q, k, v, grid, keys))
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
                block._apply(fn, recurse)
        return super()._apply(fn, recurse)  # type: ignore[no-any-return,no-untyped-call]

    def extra_repr(self) -> str:
        """What it holds, for printing."""
        return f"{len(self.blocks)} blocks"


def applied(pipeline_or_model: Any) -> Applied | None:
    """What ΔConv is on a pipeline or model; None where there is none.

    Raises:
        DeltaConvError: neither a model nor a pipeline with one.

    Example:
        >>> apply(pipeline, "weights.safetensors", blocks="all,-mid")
        >>> list(applied(pipeline).specs)[0]
        'down_blocks.0.attentions.0.transformer_blocks.0.attn1'
    """
    there = blocks_on(network_of(pipeline_or_model))
    return None if there is None else there.about


def blocks_on(model: nn.Module) -> AppliedBlocks | None:
    """The ΔConv on this model, if any."""
    return cast("AppliedBlocks | None", model._modules.get(NAME))
