"""Which backend computes a block.

Triton where it can, plain PyTorch otherwise. DELTACONV_BACKEND=torch|triton|reference forces one. What runs,
and why Triton does not, is logged once for each kind of tensor.
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import cast

import torch
from torch import Tensor

from ..errors import DeltaConvError
from .backends import Backend
from .plain import PlainBackend
from .slow import SlowBackend

log = logging.getLogger(__name__)

VARIABLE = "DELTACONV_BACKEND"
NAMES = ("torch", "triton", "reference")

_forced = os.environ.get(VARIABLE, "")
_plain: Backend = PlainBackend()
_slow: Backend = SlowBackend()
_loaded: dict[str, Backend | str] = {}
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
    triton = triton_backend()
    reason = triton if isinstance(triton, str) else triton.why_not(x)
    if reason is None:
        return cast(Backend, triton)
    _tell(f"{x.device.type}, {x.dtype}: plain PyTorch, because {reason}")
    return _plain


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def triton_backend() -> Backend | str:
    """The Triton backend, imported on the first call, or the reason why there is none."""
    if "triton" not in _loaded:
        try:
            module = importlib.import_module(".triton", __package__)
            _loaded["triton"] = module.BACKEND
        except Exception as error:  # whatever a broken installation raises is no reason to stop
            _loaded["triton"] = f"Triton cannot be used here ({type(error).__name__}: {error})"
    return _loaded["triton"]


def _forced_backend(x: Tensor) -> Backend:
    if _forced not in NAMES:
        raise DeltaConvError(f"expected {VARIABLE} to be one of {', '.join(NAMES)}, got {_forced!r}")
    known = {"torch": _plain, "reference": _slow}
    backend = known[_forced] if _forced in known else triton_backend()
    reason = backend if isinstance(backend, str) else backend.why_not(x)
    if reason is not None:
        raise DeltaConvError(
            f"{VARIABLE} is {_forced}, but {reason}; unset it, or set it to torch, which always works"
        )
    return cast(Backend, backend)


def _tell(sentence: str) -> None:
    if sentence not in _told and not torch.compiler.is_compiling():
        _told.add(sentence)
        log.info("ΔConv on %s", sentence)
