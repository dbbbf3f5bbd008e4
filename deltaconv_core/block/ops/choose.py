"""Which backend computes a block.

Triton where it can, plain PyTorch otherwise. DELTACONV_BACKEND=torch|triton|reference forces one. Why Triton
does not run on a GPU is logged once for each dtype.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ...errors import DeltaConvError
from ...util.compiling import constant_result
from .backend import Backend
from .by_reference import SlowBackend
from .by_torch import PlainBackend

log = logging.getLogger(__name__)

VARIABLE = "DELTACONV_BACKEND"
NAMES = ("torch", "triton", "reference")

_forced = os.environ.get(VARIABLE, "")
_plain: Backend = PlainBackend()
_loaded: dict[str, Backend] = {"torch": _plain, "reference": SlowBackend()}
_failures: list[str] = []
_told: set[str] = set()


def backend_for(x: Tensor) -> Backend:
    """The backend for tensors like x (device, dtype, whether autograd is on).

    Raises:
        DeltaConvError: DELTACONV_BACKEND names one that does not exist or cannot run on x.
    """
    if _forced:
        return _forced_backend(x)
    if x.device.type != "cuda":
        return _plain
    reason = _why_no_triton() or _loaded["triton"].why_not(x)
    if not reason:
        return _loaded["triton"]
    _tell(f"{x.device.type}, {x.dtype}: plain PyTorch, because {reason}")
    return _plain


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Takes this backend, whatever the environment says: for tests and benchmarks."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@constant_result
def _why_no_triton() -> str:
    """Imports the Triton backend on the first call; the reason why there is none, or nothing."""
    if "triton" not in _loaded and not _failures:
        try:
            _loaded["triton"] = importlib.import_module(".triton", __package__).BACKEND
        except Exception as error:  # whatever a broken installation raises is no reason to stop
            _failures.append(f"Triton cannot be used here ({type(error).__name__}: {error})")
    return "".join(_failures)


def _forced_backend(x: Tensor) -> Backend:
    if _forced not in NAMES:
        raise DeltaConvError(f"expected {VARIABLE} to be one of {', '.join(NAMES)}, got {_forced!r}")
    reason: str | None = _why_no_triton() if _forced == "triton" else ""
    reason = reason or _loaded[_forced].why_not(x)
    if reason:
        raise DeltaConvError(
            f"{VARIABLE} is {_forced}, but {reason}; unset it, or set it to torch, which always works"
        )
    return _loaded[_forced]


def _tell(sentence: str) -> None:
    if sentence not in _told and not torch.compiler.is_compiling():
        _told.add(sentence)
        log.info("ΔConv on %s", sentence)
