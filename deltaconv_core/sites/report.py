"""What a host tells the user about a model on which ΔConv was put; one sentence each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..util.text import listing
from .base_weights import Difference
from .sampling_range import SamplingRange


@dataclass(frozen=True)
class Report:
    """What was done, what to watch out for, and details."""

    lines: Sequence[str]
    warnings: Sequence[str] = ()
    details: Sequence[str] = ()

    @property
    def text(self) -> str:
        warnings = [f"Warning: {warning}." for warning in self.warnings]
        return "\n".join([*self.lines, *warnings, *self.details])


def of_blocks(architecture: str, sites: int, blocks: Iterable[torch.nn.Module]) -> str:
    """What stands where.

    Args:
        architecture: of the model.
        sites: how many self-attentions the model has.
        blocks: those that stand in for some of them.
    """
    blocks = list(blocks)
    weights = [weight for block in blocks for weight in block.parameters()]
    dtypes = ", ".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in weights}))
    count = sum(weight.numel() for weight in weights)
    kinds = {str(block.kind) for block in blocks} - {"deltaconv"}
    what = f"A {kinds.pop()} mixer" if kinds else "ΔConv"
    amount = f"{count / 1e6:.3g} M" if what == "ΔConv" else f"{count:,}"
    return (
        f"{what} stands in for {len(blocks)} of {sites} self-attentions of {architecture} "
        f"({amount} parameters, {dtypes})."
    )


def of_joint(checkpoint: Any, sites: Iterable[str]) -> list[str]:
    """What the joint mixers at these sites are, and what they were fitted to.

    Args:
        checkpoint: joint mixers (`Checkpoint`).
        sites: ids, for each of which it has one.
    """
    kinds: dict[str, list[str]] = {}
    for site in sites:
        kinds.setdefault(checkpoint.blocks[site].spec.text, []).append(site)
    lines = [f"{kind}: {len(ids)} attentions ({listing(ids)})." for kind, ids in kinds.items()]
    if sizes := checkpoint.metadata.get("sizes"):
        lines.append(f"They were fitted to images of {sizes} tokens.")
    return [
        *lines,
        "Each runs where it is faster than attention, which is timed when the model first samples an image "
        "of a size; what runs is told then.",
    ]


def of_kept(kept: Mapping[str, str]) -> list[str]:
    """Why attention stays at some sites.

    Args:
        kept: site id -> why (`Checkpoint.kept`).
    """
    return [f"Attention stays at {id}: {reason}." for id, reason in kept.items()]


def of_range(sampling: SamplingRange) -> list[str]:
    """Where in the sampling it runs, unless that is everywhere."""
    if sampling.is_everything:
        return []
    return [f"It runs from {sampling.start:.1%} to {sampling.end:.1%} of the sampling, attention outside."]


def of_base_weights(count: int, difference: Difference | None, strength: float | None) -> str:
    """What became of the base weights; a strength of None means that they were left out."""
    what = "left out" if strength is None else f"applied with strength {strength:g} at every step"
    compared = f"they are {difference}"
    if difference is None:
        compared = "they were not compared with the loaded model's, which are stored packed"
    return f"Base weights: {count} tensors of ResNet convolutions, {what}; {compared}."


def of_unfit_base_weights(count: int, error: Exception) -> str:
    """That base weights were left out which could not have been applied."""
    return f"Base weights: {count} tensors of ResNet convolutions, left out; they do not fit: {error}."


def assumptions(checkpoint: Any) -> list[str]:
    """What the file did not say and was guessed when it was read."""
    return [checkpoint.metadata["assumed"]] if "assumed" in checkpoint.metadata else []
