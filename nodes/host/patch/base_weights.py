"""Weights of the base model that came with the blocks: the first convolution of every ResNet.

They become weight patches on the clone, ahead of those that only add something, so that a LoRA acts the same
before and after ΔConv.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import comfy.model_patcher
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....deltaconv_core.sites.base_weights import check_fit, check_unpacked, difference
from ..model.sites import Sites

HOW_TO_LEAVE_OUT = "set base_weights to 'leave out' to use the blocks alone"


class BaseWeights:
    """Base weights beside those of the MODEL that they belong to.

    Args:
        model: ModelPatcher.
        found: its sites and convolutions.
        base_weights: diffusers parameter name -> tensor.

    Raises:
        DeltaConvError: a name that the model does not have, or another shape.
    """

    def __init__(self, model: ModelPatcher, found: Sites, base_weights: Mapping[str, Tensor]) -> None:
        self.base_weights = base_weights
        self.model = f"this MODEL ({found.architecture})"
        self.keys = _host_keys(found, base_weights)
        self.loaded = _loaded_weights(model, self.keys)
        check_fit(base_weights, self.loaded, self.model, HOW_TO_LEAVE_OUT)
        self.difference = difference(base_weights, self.loaded)
        """How far the base weights are from the loaded ones; None where these are packed."""

    def add_to(self, clone: ModelPatcher, strength: float) -> dict[str, Any]:
        """Patches the weights to loaded * (1 - strength) + base * strength.

        Returns:
            ComfyUI's key -> what was added, for `remove_base_weights`.

        Raises:
            DeltaConvError: the MODEL stores its own packed, and its loader has no patcher that unpacks them.
        """
        loaded = {
            name: stored
            for name, stored in self.loaded.items()
            if not (_unpacks(clone) and stored.shape == self.base_weights[name].shape)
        }
        check_unpacked(
            {name: self.base_weights[name] for name in loaded}, loaded, self.model, HOW_TO_LEAVE_OUT
        )
        values = {key: (self.base_weights[name],) for name, key in self.keys.items()}
        clone.add_patches(values, strength, 1.0 - strength)
        for key in values:
            own = clone.patches[key].pop()
            clone.patches[key].insert(_after_merges(clone.patches[key]), own)
        return values


def remove_base_weights(clone: ModelPatcher, added: Mapping[str, Any]) -> None:
    """Takes away what `BaseWeights.add_to` added."""
    for key, value in added.items():
        rest = [patch for patch in clone.patches.pop(key, []) if patch[1] is not value]
        if rest:
            clone.patches[key] = rest


def _unpacks(model: ModelPatcher) -> bool:
    """Whether a MODEL's loader brings its own way to patch weights, as those of packed ones do (GGUF)."""
    return type(model).patch_weight_to_device.__module__ != comfy.model_patcher.__name__


def _after_merges(patches: list[Any]) -> int:
    """The place behind every patch that scales the model's weight; what such a merge made is the base."""
    return max(
        (i + 1 for i, (_, _, strength_model, *_) in enumerate(patches) if strength_model != 1.0), default=0
    )


def _host_keys(found: Sites, names: Iterable[str]) -> dict[str, str]:
    """Name -> ComfyUI's key, of those that belong to convolutions of this MODEL."""
    keys = {}
    for name in names:
        layer, _, parameter = name.rpartition(".")
        if layer in found.convolutions and parameter in ("weight", "bias"):
            keys[name] = f"{found.convolutions[layer]}.{parameter}"
    return keys


def _loaded_weights(model: ModelPatcher, keys: Mapping[str, str]) -> dict[str, Tensor]:
    """The MODEL's weights without any patch, on whatever device they lie."""
    own = model.get_key_patches("diffusion_model.")
    originals = {name: own[key][0] for name, key in keys.items()}
    return {name: convert(weight) for name, (weight, convert) in originals.items()}
