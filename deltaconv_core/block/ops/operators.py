"""A function that launches kernels becomes an operator: autograd and torch.compile take it as one step."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils import _python_dispatch
from torch.utils.flop_counter import register_flop_formula

# The package may be loaded a second time under another name (ComfyUI names it by its folder); each copy has
# operators of its own.
NAMESPACE = re.sub(r"\W", "_", __package__ or "")


class Operator:
    """A function that is called itself where nothing asks for an operator (no gradient, no compiler, no
    dispatch mode such as a FLOP counter): that takes a CPU tens of microseconds less.

    Args:
        registered: the operator.
        directly: the function.
    """

    def __init__(self, registered: Callable[..., Any], directly: Callable[..., Any]) -> None:
        self.registered, self.directly = registered, directly

    def __call__(self, *arguments: Any) -> Any:
        return (self.registered if operators_wanted(arguments) else self.directly)(*arguments)


def operator(
    name: str,
    schema: str,
    shape: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    remember: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
) -> Callable[[Callable[..., Any]], Operator]:
    """Decorates the function that computes, and registers it with PyTorch.

    Args:
        schema: arguments and results in PyTorch's notation.
        shape: with the same arguments, results of the right shape and dtype and of any content.
        backward, remember: what `torch.library.register_autograd` takes as backward and setup_context.
        flops: with the arguments, shapes in place of tensors, floating point operations: two for each
            multiply-add. None: nothing that PyTorch's counter counts.
    """

    def decorate(compute: Callable[..., Any]) -> Operator:
        registered = torch.library.custom_op(f"{NAMESPACE}::{name}", compute, mutates_args=(), schema=schema)
        registered.register_fake(shape)
        if backward is not None:
            registered.register_autograd(backward, setup_context=remember)
        if flops is not None:
            register_flop_formula(getattr(getattr(torch.ops, NAMESPACE), name))(flops)

        return Operator(registered, compute)

    return decorate


def operators_wanted(arguments: Iterable[Any]) -> bool:
    """Whether a compiler, a dispatch mode or autograd wants to see operators that work on these arguments."""
    if torch.compiler.is_compiling() or _python_dispatch._get_current_dispatch_mode() is not None:
        return True
    recorded = torch.is_grad_enabled()
    for argument in arguments:
        kind = type(argument)
        if kind is Tensor or kind is Parameter:
            if recorded and argument.requires_grad:
                return True
        elif kind is list or kind is tuple:
            if operators_wanted(argument):
                return True
        elif isinstance(argument, Tensor):  # of another type: it belongs to a compiler that traces
            return True
    return False


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Kernels are launched on the current GPU, which has to be that of their tensors."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()  # type: ignore[no-untyped-call]
