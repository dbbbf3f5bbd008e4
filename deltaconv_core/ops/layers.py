"""Calling a layer in the dtype of its input, whoever made the layer."""

from __future__ import annotations

from torch import Tensor, nn


def call_layer(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """Applies a layer in x's dtype, whatever dtype its weights are stored in.

    A layer that casts its weights itself (ComfyUI's castable layers, which also move and patch them) is
    called and its weights are left alone; a plain layer of another dtype runs on cast weights.
    """
    y: Tensor
    if layer.weight.dtype == x.dtype or getattr(layer, "comfy_cast_weights", False):
        y = layer(x)
        return y
    weight = layer.weight.to(x.dtype)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    if isinstance(layer, nn.Conv2d):
        y = nn.functional.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        return y
    return nn.functional.linear(x, weight, bias)
