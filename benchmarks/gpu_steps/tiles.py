"""How kernels are called, and their inner life: the only place that knows how they are tuned."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor


@dataclass
class Kernel:
    """One Triton kernel whose configuration can be forced."""

    tuned: Any

    @property
    def configurations(self) -> list[Any]:
        return list(self.tuned.tuner.configs)

    @contextmanager
    def only(self, number: int) -> Iterator[None]:
        """With this configuration alone (or the last one, where there are fewer)."""
        tuner = self.tuned.tuner
        before = tuner.configs
        tuner.configs = [before[min(number, len(before) - 1)]]
        self.tuned.forget()
        try:
            yield
        finally:
            tuner.configs = before
            self.tuned.forget()


def triton_kernels() -> dict[str, Kernel]:
    """Name -> kernel, of those whose configurations can be chosen; none in the interpreter."""
    found = {}
    places = {
        "depthwise": ("depthwise_gate", "_depthwise"),
        "weight gradient": ("depthwise_gate", "_weight_gradient"),
        "project": ("project", "_project"),
        "pool": ("pool", "_pool"),
        "enlarge": ("enlarge", "_adjoint"),
        "sum of tokens": ("mean", "_sum_tokens"),
        "product of the mean": ("mean", "_project_mean"),
        "taps": ("depthwise_gate", "_transpose"),
    }
    for name, (module, attribute) in places.items():
        tuned = getattr(import_module(f"deltaconv_core.block.ops.triton.{module}"), attribute, None)
        if hasattr(getattr(tuned, "tuner", None), "configs"):
            found[name] = Kernel(tuned)
    return found


def configurations(name: str) -> list[tuple[str, Any]]:
    """How a kernel may run: text, and a context in which it does."""
    kernel = triton_kernels().get(name)
    if kernel is None:
        return [("as chosen", nullcontext())]
    return [
        (f"{'/'.join(map(str, c.kwargs.values()))} {c.num_warps}w", kernel.only(i))
        for i, c in enumerate(kernel.configurations)
    ]


@contextmanager
def only(number: int) -> Iterator[None]:
    """Every kernel with its configuration of this number: nothing is timed, and little compiled."""
    with ExitStack() as stack:
        for kernel in triton_kernels().values():
            stack.enter_context(kernel.only(number))
        yield


def tensor_core_kernel() -> Any:
    """The module of the depth-wise kernel on tensor cores; a text that says why there is none."""
    try:
        return import_module("deltaconv_core.block.ops.cuda")
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def why_not_on_tensor_cores(x: Tensor, size: tuple[int, int], kernel_size: int) -> str:
    """Why a block does not mix the tokens x with it; nothing if it does."""
    cuda = tensor_core_kernel()
    if isinstance(cuda, str):
        return cuda
    with torch.no_grad():
        return cuda.BACKEND.why_not(x, size, kernel_size) or ""


def triton_backend() -> Any:
    return import_module("deltaconv_core.block.ops.triton").BACKEND


def tensor_cores(u: Tensor, weight: Tensor, kind: str = "simple", **options: Any) -> Any:
    """A call of the tensor-core kernel for u (B, c, H, W); a text where it does not run."""
    cuda = tensor_core_kernel()
    if isinstance(cuda, str):
        return cuda
    if why := cuda.why_not(u, weight):
        return str(why)
    channels = u.shape[1]
    factor = math.sqrt(channels / 2) if kind == "simple" else 1 / math.sqrt(channels)
    out = torch.float32 if u.dtype == torch.float16 else u.dtype
    return lambda: cuda.depthwise_gate(u, weight, None, kind == "sigmoid", factor, out, **options)
