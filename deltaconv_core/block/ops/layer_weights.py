"""A layer's weights in the dtype of its input, whoever made the layer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...util.compiling import constant_result

T = TypeVar("T")
PLAIN = (nn.Linear, nn.Conv2d)


def call_layer(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """Applies a layer in x's dtype, whatever dtype its weights are stored in.

    A layer that casts its weights itself (ComfyUI's castable layers, which also move and patch them) is
    called and its weights are left alone; a plain layer of another dtype runs on cast weights. Whatever else
    has another dtype is called on a cast input, unless its dtype is one that nobody computes in.
    """
    y: Tensor
    own = layer.weight.dtype
    if own == x.dtype or getattr(layer, "comfy_cast_weights", False):
        y = layer(x)
        return y
    if not gives_weights(layer):
        y = layer(x if own.itemsize == 1 else x.to(own)).to(x.dtype)
        return y
    weight = layer.weight.to(x.dtype)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    if isinstance(layer, nn.Conv2d):
        y = nn.functional.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        return y
    return nn.functional.linear(x, weight, bias)


def gives_weights(layer: nn.Module) -> bool:
    """Whether `with_weights` works on it: a layer of plain PyTorch without hooks, or one that offers it.

    Whatever else stands where a layer was (adapters, quantized layers, a host's castable layers without that
    method) means something by being called, so it has to be called.
    """
    if type(layer) in PLAIN:
        return not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__)
    return hasattr(layer, "with_weights")


def with_weights(layer: Any, x: Tensor, function: Callable[[Tensor, Tensor | None], T]) -> T:
    """function(weight, bias) with the layer's weights in x's dtype, for layers that `gives_weights`.

    A host's layer may have a method of this name, called as method(x, function), which moves, casts and
    patches its weights for x and takes them back when the function returns.
    """
    if type(layer) not in PLAIN:
        return layer.with_weights(x, function)  # type: ignore[no-any-return]
    return function(layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Where autocast is on for x's device, it is off inside.

    It does not know Triton kernels, interpolates in float32, and leaves out products that are told where to
    write.
    """
    kind = x.device.type
    if _knows_autocast(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


@constant_result
def _knows_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)
