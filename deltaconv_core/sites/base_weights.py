"""Weights of the base model that came with the blocks: the first convolution of every ResNet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, float64, nn

from ..errors import DeltaConvError
from ..util.devices import float64_device


@dataclass(frozen=True)
class Difference:
    """How far base weights lie from those of the loaded model, as |base - loaded| / |loaded|.

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


def is_packed(stored: Tensor) -> bool:
    """Whether what a model stores for a weight are not its numbers: quantised, or of a class of its own."""
    return type(stored) not in (Tensor, nn.Parameter) or not stored.is_floating_point()


def difference(base_weights: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> Difference | None:
    """How far base weights are from the loaded ones, both by the same names; None where these are packed."""
    plain = {name: weight for name, weight in base_weights.items() if not is_packed(loaded[name])}
    if not plain:
        return None
    squares = {name: _squares(weight, loaded[name]) for name, weight in plain.items()}
    ratios = {name: _ratio(*pair) for name, pair in squares.items()}
    where = max(ratios, key=ratios.__getitem__)
    change, size = (sum(column) for column in zip(*squares.values(), strict=True))
    return Difference(_ratio(change, size), ratios[where], where)


def check_fit(
    base_weights: Mapping[str, Tensor], loaded: Mapping[str, Tensor], model: str, remedy: str
) -> None:
    """Checks that the model has every one of the base weights, in the same shape as far as that can be seen.

    Args:
        base_weights: diffusers parameter name -> tensor.
        loaded: those of them that the model has.
        model: how messages call the model.
        remedy: what the user can do, for messages.

    Raises:
        DeltaConvError: otherwise.
    """
    for name, weight in base_weights.items():
        if name not in loaded:
            raise DeltaConvError(
                f"the weights hold {name} for the base model, but {model} has no such weight; {remedy}"
            )
        if weight.shape != loaded[name].shape and not is_packed(loaded[name]):
            raise DeltaConvError(
                f"the weights hold {name} of shape {tuple(weight.shape)}, {model} has "
                f"{tuple(loaded[name].shape)}; {remedy}"
            )


def check_unpacked(
    base_weights: Mapping[str, Tensor], loaded: Mapping[str, Tensor], model: str, remedy: str
) -> None:
    """Checks that base weights can take the place of what the model stores; arguments as for `check_fit`.

    Raises:
        DeltaConvError: what it stores is not the weight itself.
    """
    for name in base_weights:
        if is_packed(loaded[name]):
            kind = f"{type(loaded[name]).__qualname__}, {str(loaded[name].dtype).removeprefix('torch.')}"
            raise DeltaConvError(
                f"the weights hold {name} for the base model, but {model} stores its own packed ({kind}), "
                f"where nothing can be put in their place; {remedy}"
            )


def _squares(base: Tensor, loaded: Tensor) -> tuple[float, float]:
    """(|base - loaded|², |loaded|²)"""
    loaded = loaded.to(float64_device(loaded.device)).float()
    change = base.to(loaded) - loaded
    return change.square().sum(dtype=float64).item(), loaded.square().sum(dtype=float64).item()


def _ratio(change: float, size: float) -> float:
    return (change / size) ** 0.5 if size else float(change > 0)
