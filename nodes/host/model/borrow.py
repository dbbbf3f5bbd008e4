"""A MODEL lent to training for a while: loaded, frozen, open to gradients; afterwards it is what it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.model_patcher import ModelPatcher

from ....deltaconv_core.errors import DeltaConvError


@contextmanager
def borrowed_model(model: ModelPatcher, dtype: torch.dtype, memory: float) -> Iterator[ModelPatcher]:
    """A loaded clone of the MODEL that gradients can pass through; whatever happens, all is put back.

    Nodes run in inference mode, where ComfyUI makes and moves its weights; so the clone is loaded in the
    caller's mode, and only then left for a mode with gradients.

    Args:
        model: ModelPatcher.
        dtype: what its layers compute in, whatever the dtype of their weights.
        memory: bytes to leave free on its device.
    """
    clone = _clone(model)
    clone.set_model_compute_dtype(dtype)
    try:
        comfy.model_management.load_models_gpu([clone], memory_required=memory)
        clone.pre_run()
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(open_to_gradients(clone.model))
            stack.enter_context(_in_eval_mode(clone.model))
            stack.enter_context(_weights_cast_apart())
            yield clone
    finally:
        clone.cleanup()
        clone.detach()
        for module in clone.model.modules():
            # ComfyUI leaves layers set to casting when it unloads; where it then loads only a part of the
            # model, it takes those for done and forgets their LoRAs.
            comfy.model_patcher.wipe_lowvram_weight(module)


@contextmanager
def open_to_gradients(model: torch.nn.Module) -> Iterator[None]:
    """Inside, frozen normal tensors on the same memory stand in for the model's weights and buffers.

    Tensors made in inference mode cannot be saved for a backward pass. Those that stand in are views of
    their memory; afterwards the very objects are back.
    """
    swapped: list[tuple[dict[str, Any], str, torch.Tensor, torch.Tensor]] = []
    try:
        for module in model.modules():
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for table in tables:
                for name, tensor in table.items():
                    if _can_be_wrapped(tensor):
                        swapped.append((table, name, tensor, _wrapped(tensor)))
                        table[name] = swapped[-1][-1]
        yield
    finally:
        for table, name, tensor, wrapped in swapped:
            if table[name] is wrapped:
                table[name] = tensor


def _can_be_wrapped(tensor: torch.Tensor | None) -> bool:
    if tensor is None or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return False  # quantized ones look after themselves
    return tensor.is_inference() or tensor.requires_grad


def _wrapped(tensor: torch.Tensor) -> torch.Tensor:
    wrapped = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    wrapped.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(wrapped, requires_grad=False)
    return wrapped


def _clone(model: ModelPatcher) -> ModelPatcher:
    """A clone of the plain kind.

    Newer versions of ComfyUI page the weights of some MODELs in and out under the layers ("dynamic"), which
    a backward pass could not rely on; they can load such a MODEL once more as a plain one.

    Raises:
        DeltaConvError: they cannot, because its loader did not say how.
    """
    if not getattr(model, "is_dynamic", lambda: False)():
        return model.clone()
    try:
        return model.clone(disable_dynamic=True)
    except RuntimeError as error:
        raise DeltaConvError(
            f"ComfyUI cannot load this MODEL without its dynamic VRAM ({error}), in which nothing can be "
            "trained; start ComfyUI with --disable-dynamic-vram"
        ) from error


@contextmanager
def _in_eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """ComfyUI's own training nodes leave a model in training mode, in which PixArt cannot run."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _weights_cast_apart() -> Iterator[None]:
    """Inside, a weight that is copied to the GPU for one call of its layer gets memory of its own.

    With asynchronous offloading, ComfyUI would reuse one buffer for all of them, while the backward pass
    still needs what was in it.
    """
    management = comfy.model_management
    streams = management.NUM_STREAMS
    in_training = getattr(management, "in_training", None)
    try:
        management.NUM_STREAMS = 0
        if in_training is not None:
            management.in_training = True
        yield
    finally:
        management.NUM_STREAMS = streams
        if in_training is not None:
            management.in_training = in_training
