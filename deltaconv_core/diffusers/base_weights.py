"""Weights of the base model that came with the blocks, in the model itself, and its own back again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..errors import DeltaConvError
from ..sites.base_weights import check_fit, check_unpacked, difference, is_packed

HOW_TO_LEAVE_OUT = "pass base_weights_strength=0 to use the blocks alone"


class BaseWeights:
    """Base weights beside those of the model that they belong to.

    Args:
        model: with ΔConv on it or without.
        base_weights: parameter name -> tensor.
        originals: what the model had in place of base weights that are in it now.

    Raises:
        DeltaConvError: a name that the model does not have, another shape, or weights out of reach.
    """

    def __init__(
        self, model: nn.Module, base_weights: Mapping[str, Tensor], originals: Mapping[str, Tensor]
    ) -> None:
        self.base_weights = base_weights
        self.model = f"this model ({type(model).__name__})"
        parameters = {name: own for name in base_weights if (own := _parameter(model, name)) is not None}
        check_fit(base_weights, parameters, self.model, HOW_TO_LEAVE_OUT)
        _check_reach(parameters)
        self.own = {name: originals.get(name, _data(own)) for name, own in parameters.items()}
        self.difference = difference(base_weights, self.own)
        """How far the base weights are from the model's own."""

    def mixed(self, strength: float) -> dict[str, Tensor]:
        """own * (1 - strength) + base * strength, in the dtype and layout of the model's own.

        Raises:
            DeltaConvError: the model stores its own packed.
        """
        check_unpacked(self.base_weights, self.own, self.model, HOW_TO_LEAVE_OUT)
        with torch.inference_mode(False), torch.no_grad():
            return {name: self._mix(name, own, strength) for name, own in self.own.items()}

    def _mix(self, name: str, own: Tensor, strength: float) -> Tensor:
        base = self.base_weights[name].to(own.device, torch.float32)
        return torch.empty_like(own).copy_(own.float().lerp(base, strength))


def exchange(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives parameters of the model other values, on the device and in the dtype that they have now.

    Returns:
        The values that they had, kept in the CPU's memory.
    """
    before = {}
    with torch.inference_mode(False), torch.no_grad():
        for name, value in weights.items():
            parameter = _parameter(model, name)
            if parameter is not None:
                before[name] = parameter.data.cpu()
                parameter.data = value.to(parameter.device, parameter.dtype)
    return before


def check_exchange(model: nn.Module, names: Iterable[str]) -> None:
    """Checks that parameters of the model can be given other values.

    Raises:
        DeltaConvError: weights that are out of reach, or that a LoRA was fused into.
    """
    parameters = {name: own for name in names if (own := _parameter(model, name)) is not None}
    _check_reach(parameters)
    for name in parameters:
        if getattr(_layer(model, name), "merged", False):
            raise DeltaConvError(
                f"a LoRA is fused into {name} of the model, where base weights are to be put in or taken "
                "out; call unfuse_lora() first, and fuse it again afterwards"
            )


def _data(parameter: nn.Parameter) -> Tensor:
    """What a parameter stores; those of a class of their own stay what they are."""
    return parameter if is_packed(parameter) else parameter.data


def _check_reach(parameters: Mapping[str, nn.Parameter]) -> None:
    away = next((name for name, parameter in parameters.items() if parameter.is_meta), None)
    if away is not None:
        raise DeltaConvError(
            f"{away} of the model is stored elsewhere (sequential CPU offload?) and can be neither compared "
            "nor changed; take the offloading off first, with remove_all_hooks() of the pipeline"
        )


def _layer(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return None


def _parameter(model: nn.Module, name: str) -> nn.Parameter | None:
    """A parameter by the name that it has without LoRA; peft's layers hand out those that they wrap."""
    parameter = getattr(_layer(model, name), name.rpartition(".")[2], None)
    return parameter if isinstance(parameter, nn.Parameter) else None
