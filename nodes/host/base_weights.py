"""Weights of the base model that were published with the blocks: the first convolution of every ResNet.

They become weight patches on the clone, ahead of those that only add something, so that a LoRA acts the same
before and after ΔConv.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, float64

from ...deltaconv_core.errors import DeltaConvError
from .sites import Sites

LEAVE_OUT = "set base_weights to 'leave out' to use the blocks alone"


@dataclass(frozen=True)
class Difference:
    """How far published weights lie from those of the loaded model, as |published - loaded| / |loaded|.

    Args:
        overall: over all tensors together.
        largest: of the tensor that differs most, whose diffusers name is `where`.
    """

    overall: float
    largest: float
    where: str

    def __str__(self) -> str:
        if self.overall == 0:
            return "the same as the loaded model's"
        return (
            f"{self.overall:.2%} away from the loaded model's (at most {self.largest:.2%}, at {self.where})"
        )


class BaseWeights:
    """Published weights beside those of the MODEL that they belong to.

    Args:
        model: ModelPatcher.
        found: its sites and convolutions.
        published: diffusers parameter name -> tensor.

    Raises:
        DeltaConvError: a name that the model does not have, or another shape.
    """

    def __init__(self, model: Any, found: Sites, published: Mapping[str, Tensor]) -> None:
        self.published = published
        self.keys = {name: _host_key(found, name) for name in published}
        self.loaded = _loaded_weights(model, self.keys.values())
        for name, weight in published.items():
            loaded = self.loaded[self.keys[name]]
            if weight.shape != loaded.shape:
                raise DeltaConvError(
                    f"the weights hold {name} of shape {tuple(weight.shape)}, this MODEL "
                    f"({found.architecture}) has {tuple(loaded.shape)}; {LEAVE_OUT}"
                )

    def difference(self) -> Difference:
        """How far the published weights are from the loaded ones."""
        squares = {name: _squares(self.published[name], self.loaded[key]) for name, key in self.keys.items()}
        ratios = {name: _ratio(*pair) for name, pair in squares.items()}
        where = max(ratios, key=ratios.__getitem__)
        change, size = (sum(column) for column in zip(*squares.values(), strict=True))
        return Difference(_ratio(change, size), ratios[where], where)

    def add_to(self, clone: Any, strength: float) -> dict[str, Any]:
        """Patches the weights to loaded * (1 - strength) + published * strength.

        Returns:
            ComfyUI's key -> what was added, for `remove`.
        """
        values = {key: (self.published[name],) for name, key in self.keys.items()}
        clone.add_patches(values, strength, 1.0 - strength)
        for key in values:
            own = clone.patches[key].pop()
            clone.patches[key].insert(_after_merges(clone.patches[key]), own)
        return values


def remove(clone: Any, added: Mapping[str, Any]) -> None:
    """Takes away what `BaseWeights.add_to` added."""
    for key, value in added.items():
        rest = [patch for patch in clone.patches.pop(key, []) if patch[1] is not value]
        if rest:
            clone.patches[key] = rest


def _after_merges(patches: list[Any]) -> int:
    """The place behind every patch that scales the model's weight; what such a merge made is the base."""
    return max(
        (i + 1 for i, (_, _, strength_model, *_) in enumerate(patches) if strength_model != 1.0), default=0
    )


def _host_key(found: Sites, name: str) -> str:
    layer, _, parameter = name.rpartition(".")
    if layer not in found.convolutions or parameter not in ("weight", "bias"):
        raise DeltaConvError(
            f"the weights hold {name} for the base model, but this MODEL ({found.architecture}) has no such "
            f"weight; {LEAVE_OUT}"
        )
    return f"{found.convolutions[layer]}.{parameter}"


def _loaded_weights(model: Any, keys: Any) -> dict[str, Tensor]:
    """The MODEL's weights without any patch, on whatever device they lie."""
    own = model.get_key_patches("diffusion_model.")
    originals = {key: own[key][0] for key in keys}
    return {key: convert(weight) for key, (weight, convert) in originals.items()}


def _squares(published: Tensor, loaded: Tensor) -> tuple[float, float]:
    """(|published - loaded|², |loaded|²)"""
    loaded = loaded.float()
    change = published.to(loaded) - loaded
    return change.square().sum(dtype=float64).item(), loaded.square().sum(dtype=float64).item()


def _ratio(change: float, size: float) -> float:
    return (change / size) ** 0.5 if size else float(change > 0)
