"""Which dtype and which backend compute a block.

Triton where it can, plain PyTorch otherwise. DELTACONV_BACKEND=torch|cuda|triton|reference forces one. `cuda`
(tensor cores) never runs otherwise, because no GPU has run a whole block with it. Why Triton does not run is
logged once for each dtype.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import DeltaConvError
from ...util.compiling import constant_result
from ...util.once import Once
from . import fastest
from .backend import Backend, Size
from .by_reference import ReferenceBackend
from .by_torch import TorchBackend

if TYPE_CHECKING:
    from .cuda import CudaBackend
    from .triton import TritonBackend

log = logging.getLogger(__name__)

VARIABLE = "DELTACONV_BACKEND"
NAMES = ("torch", "cuda", "triton", "reference")
TRIAL_TOKENS = 256

TORCH, REFERENCE = TorchBackend(), ReferenceBackend()


class BackendChoice:
    """What this process knows about its backends."""

    def __init__(self) -> None:
        self.say = Once(log.info)
        self.reset()

    def reset(self) -> None:
        """As in a new process: Triton is loaded again, and why it does not run is said again."""
        self.forced: str | None = None
        self.triton: TritonBackend | None = None
        self.why_no_triton = ""
        self.say.reset()


choice = BackendChoice()


def backend_for(x: Tensor) -> Backend:
    """The backend for tensors like x (device, dtype, whether autograd is on).

    Raises:
        DeltaConvError: DELTACONV_BACKEND names one that does not exist or cannot run on x.
    """
    if name := _forced_name():
        return _forced_backend(name, x)
    if x.device.type != "cuda":
        return TORCH
    triton = _triton(x)
    if not isinstance(triton, str):
        return triton
    if not torch.compiler.is_compiling():
        choice.say(f"ΔConv on {x.device.type}, {x.dtype}: plain PyTorch, because {triton}")
    return TORCH


def at_once_backend_for(x: Tensor) -> TritonBackend | None:
    """The backend that may mix tokens like x by a whole block at once; None where a block takes its steps."""
    name = _forced_name()
    if name not in ("", "triton") or (not name and x.device.type != "cuda"):
        return None
    return choice.triton if backend_for(x) is choice.triton else None


def planes_backend_for(x: Tensor, grid: Size, kernel_size: int) -> CudaBackend | None:
    """The backend that works on planes, for tokens like x on a grid (H, W); None where `backend_for` decides.

    Raises:
        DeltaConvError: DELTACONV_BACKEND asks for it and it cannot run.
    """
    if _forced_name() != "cuda":
        return None
    from .cuda import BACKEND

    if reason := BACKEND.why_not(x, grid, kernel_size):
        raise DeltaConvError(f"{VARIABLE} is cuda, but {reason}; unset it, or set it to torch")
    if not torch.compiler.is_compiling():
        choice.say(f"ΔConv on {x.device.type}, {x.dtype}: {BACKEND.what_runs(x)}")
    return BACKEND


def backend_for_convolution(x: Tensor) -> Backend:
    """The backend for `depthwise` and `shrink` of x (B, H, W, c): as `backend_for`, but `cuda` always can."""
    if _forced_name() != "cuda":
        return backend_for(x)
    from .cuda import BACKEND

    return BACKEND


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Takes this backend, whatever the environment says: for tests and benchmarks."""
    before, choice.forced = choice.forced, name
    try:
        yield
    finally:
        choice.forced = before


def compute_dtype(x: Tensor) -> torch.dtype:
    """In which dtype to mix the tokens x (B, N, C): x's own, except on a CPU.

    There it is float32 for float16, whose kernels are 60 to 240 times slower, and for bfloat16 where a matrix
    product is faster in float32: without instructions for bfloat16 it is about ten times as fast.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float16, torch.bfloat16):
        return x.dtype
    if x.dtype == torch.float16:
        return torch.float32
    part = x[0, :TRIAL_TOKENS]
    return fastest.fastest(
        "product",
        {"as it is": torch.bfloat16, "in float32": torch.float32},
        default="as it is",
        like=x,
        details=("channels", x.shape[2]),
        tokens=len(part),
        trial=lambda dtype: part.to(dtype) @ part.to(dtype).T,
    )


def _forced_name() -> str:
    return _from_environment() if choice.forced is None else choice.forced


@constant_result
def _from_environment() -> str:
    return os.environ.get(VARIABLE, "")


def _forced_backend(name: str, x: Tensor) -> Backend:
    if name not in NAMES:
        raise DeltaConvError(f"expected {VARIABLE} to be one of {', '.join(NAMES)}, got {name!r}")
    if name == "cuda":
        raise DeltaConvError(
            f"{VARIABLE} is cuda, but a layer's weights cannot be read, or autocast is on; unset it"
        )
    if name != "triton":
        return TORCH if name == "torch" else REFERENCE
    triton = _triton(x)
    if isinstance(triton, str):
        raise DeltaConvError(
            f"{VARIABLE} is triton, but {triton}; unset it, or set it to torch, which always works"
        )
    return triton


def _triton(x: Tensor) -> Backend | str:
    """The Triton backend, or the reason why it cannot run on tensors like x, as a clause."""
    if reason := _load_triton():
        return reason
    assert choice.triton is not None
    return choice.triton.why_not(x) or choice.triton


@constant_result
def _load_triton() -> str:
    """Imports the Triton backend on the first call; the reason why there is none, or nothing."""
    if choice.triton is None and not choice.why_no_triton:
        try:
            choice.triton = importlib.import_module(".triton", __package__).BACKEND
        except Exception as error:  # whatever a broken installation raises is no reason to stop
            choice.why_no_triton = f"Triton cannot be used here ({type(error).__name__}: {error})"
    return choice.why_no_triton
