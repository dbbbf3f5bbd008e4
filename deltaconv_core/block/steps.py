"""The steps of a block, made from its layers: by a backend on borrowed weights, or by calling each layer.

A backend wants a layer's weights and not the layer. A layer that does more than its weights say (hooks,
adapters, quantized weights) does its work in forward, so it must be called; plain PyTorch does the rest.

All tensors are (B, H, W, channels); u, the projected tokens, is contiguous, or a view of contiguous planes
(B, channels, H, W) where the backend made it itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..util.compiling import constant_result
from . import ops
from .ops.backend import Size
from .spec import BlockSpec

PLAIN_LAYERS = (nn.Linear, nn.Conv2d)


class Steps(Protocol):
    """What `DeltaConvBlock.forward` does between its first projection and its result."""

    def scope(self, u: Tensor) -> AbstractContextManager[Any]:
        """What the steps run in."""

    def stage(self, layer: nn.Conv2d, u: Tensor, scale: float) -> Tensor:
        """u (B, H, W, inter), shrunk by the scale, convolved, gated: (B, h, w, inter / 2)."""

    def with_context(self, stages: list[Tensor], u: Tensor) -> list[Tensor]:
        """The stages and the context stage of u, in the order of the weights that project them."""

    def project(self, layer: nn.Linear, stages: Sequence[Tensor], everywhere: Tensor, grid: Size) -> Tensor:
        """Enlarges the stages to the grid, merges them, applies the layer, adds `everywhere` (B, 1, C).

        Returns:
            (B, H * W, C).
        """


def at_once(spec: BlockSpec, layers: Sequence[nn.Linear | nn.Conv2d], x: Tensor, grid: Size) -> Tensor | None:
    """A block's result (B, H * W, C) where a backend computes it at once; None where it takes its steps.

    Args:
        layers: conv_up, conv_pool, the stages' convolutions, conv_out.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or _autocast(x.device.type):
        return None
    if spec.context or spec.pooling != "average":
        return None
    backend = ops.at_once_backend_for(x)
    if backend is None or not all(map(lends_weights, layers)):
        return None
    if all(type(layer) in PLAIN_LAYERS for layer in layers):
        return backend.mixed_at_once(x, grid, spec, *[_cast(layer, x.dtype) for layer in layers])
    with ExitStack() as stack:
        return backend.mixed_at_once(
            x, grid, spec, *[stack.enter_context(borrowed(layer, x)) for layer in layers]
        )


def begin(
    spec: BlockSpec, up: nn.Linear, layers: Sequence[nn.Module], x: Tensor, grid: Size
) -> tuple[Steps, Tensor]:
    """The steps, and what they work on: u (B, H, W, inter), the tokens x (B, H * W, C) projected by `up`."""
    if all(map(lends_weights, [up, *layers])) and not _autocast(x.device.type):
        backend = ops.planes_backend_for(x, grid, spec.kernel_size)
        if backend is not None:
            with borrowed(up, x) as (weight, bias):
                return FastSteps(spec, backend), backend.expand(x, weight, bias, grid)
    u = call_layer(up, x).reshape(len(x), *grid, -1).contiguous()
    return steps_for(spec, layers, u), u


def steps_for(spec: BlockSpec, layers: Iterable[nn.Module], u: Tensor) -> Steps:
    """The fast steps where all layers lend their weights, else those that call each layer."""
    return FastSteps(spec, ops.backend_for(u)) if all(map(lends_weights, layers)) else LayerSteps(spec)


class FastSteps:
    """A backend computes, on the weights of the layers."""

    def __init__(self, spec: BlockSpec, backend: ops.Backend) -> None:
        self.spec, self.backend = spec, backend

    def scope(self, u: Tensor) -> AbstractContextManager[Any]:
        return _no_autocast(u.device.type)  # u has its dtype, and all that follows has u's

    def stage(self, layer: nn.Conv2d, u: Tensor, scale: float) -> Tensor:
        z = u if scale == 1 else self.backend.shrink(u, scale, self.spec.pooling)
        with borrowed(layer, z) as (weight, bias):
            return self.backend.depthwise_gate(z, weight, bias, self.spec.gate)

    def with_context(self, stages: list[Tensor], u: Tensor) -> list[Tensor]:
        context = _context(u, self.spec.gate)
        if self.spec.merge == "concat" or 1 not in self.spec.scales:
            return [*stages, context]
        # Added here, so that no backend multiplies two stages of the full size.
        full = self.spec.scales.index(1)
        return [*stages[:full], stages[full] + context, *stages[full + 1 :]]

    def project(self, layer: nn.Linear, stages: Sequence[Tensor], everywhere: Tensor, grid: Size) -> Tensor:
        merge = self.spec.merge
        with borrowed(layer, everywhere) as (weight, bias):
            if bias is None:
                return self.backend.project(stages, weight, everywhere, grid, merge)
            if torch.is_grad_enabled():
                # A sum image by image would round the gradient of the bias twice.
                return self.backend.project(stages, weight, everywhere, grid, merge) + bias
            return self.backend.project(stages, weight, everywhere + bias, grid, merge)


class LayerSteps:
    """Each layer is called, and plain PyTorch computes the rest."""

    def __init__(self, spec: BlockSpec) -> None:
        self.spec = spec

    def scope(self, u: Tensor) -> AbstractContextManager[Any]:
        return nullcontext()

    def stage(self, layer: nn.Conv2d, u: Tensor, scale: float) -> Tensor:
        z = u.permute(0, 3, 1, 2)
        z = z if scale == 1 else ops.shrink(z, scale, self.spec.pooling)
        return ops.gate(call_layer(layer, z), self.spec.gate).permute(0, 2, 3, 1)

    def with_context(self, stages: list[Tensor], u: Tensor) -> list[Tensor]:
        return [*stages, _context(u, self.spec.gate)]

    def project(self, layer: nn.Linear, stages: Sequence[Tensor], everywhere: Tensor, grid: Size) -> Tensor:
        f = ops.joined(stages, grid, self.spec.merge)
        if everywhere.dtype == torch.float16:
            return project_half(layer, f, everywhere)
        return call_layer(layer, f) + everywhere


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
    if not lends_weights(layer):
        y = layer(x if own.itemsize == 1 else x.to(own)).to(x.dtype)
        return y
    weight, bias = _cast(layer, x.dtype)
    if isinstance(layer, nn.Conv2d):
        y = nn.functional.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        return y
    return nn.functional.linear(x, weight, bias)


def lends_weights(layer: nn.Module) -> bool:
    """Whether `borrowed` works on it: a layer of plain PyTorch without hooks, or one that offers it."""
    if type(layer) in PLAIN_LAYERS:
        return not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__)
    return hasattr(layer, "lend_weights")


def borrowed(layer: Any, x: Tensor) -> AbstractContextManager[tuple[Tensor, Tensor | None]]:
    """`with borrowed(layer, x) as (weight, bias)`: a layer's weights in x's dtype, if it `lends_weights`.

    A host's layer may have a method `lend_weights(x)` that returns such a context manager: it moves, casts
    and patches the weights for x when it is entered, and takes them back when it is left.
    """
    manager: AbstractContextManager[tuple[Tensor, Tensor | None]]
    manager = _Cast(layer, x.dtype) if type(layer) in PLAIN_LAYERS else layer.lend_weights(x)
    return manager


class _Cast:
    """A plain layer's weights in a dtype; nothing has to be given back."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, dtype: torch.dtype) -> None:
        self.layer, self.dtype = layer, dtype

    def __enter__(self) -> tuple[Tensor, Tensor | None]:
        return _cast(self.layer, self.dtype)

    def __exit__(self, *error: object) -> None:
        pass


def _cast(layer: nn.Linear | nn.Conv2d, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    own: dict[str, Any] = layer._parameters  # attributes of a module take several times as long to read
    try:
        weight, bias = own["weight"], own["bias"]
    except KeyError:  # replaced by something that is no parameter
        weight, bias = layer.weight, layer.bias
    if weight.dtype == dtype:
        return weight, bias if bias is None or bias.dtype == dtype else bias.to(dtype)
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def project_half(layer: nn.Linear, x: Tensor, offset: Tensor) -> Tensor:
    """layer(x) + offset with the matrix product in float16, for a float32 x beyond float16's range.

    Args:
        layer: a Linear with bias, c -> C.
        x: (B, N, c) float32.
        offset: (B, 1, C).

    Returns:
        (B, N, C) float32.
    """
    rows, scale = ops.scale_rows(x)
    y = call_layer(layer, rows).float() * scale
    return y + layer.bias.to(y) * (1 - scale) + offset.float()


def _context(u: Tensor, kind: str) -> Tensor:
    """(B, H, W, c) -> (B, H, W, c / 2)."""
    return ops.context(u.permute(0, 3, 1, 2), kind).permute(0, 2, 3, 1)


def _no_autocast(kind: str) -> AbstractContextManager[Any]:
    """Where autocast is on for this kind of device, it is off inside.

    It does not know Triton kernels, interpolates in float32, and leaves out products that are told where to
    write.
    """
    return torch.autocast(kind, enabled=False) if _autocast(kind) else nullcontext()


def _autocast(kind: str) -> bool:
    return _knows_autocast(kind) and torch.is_autocast_enabled(kind)


@constant_result
def _knows_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)
