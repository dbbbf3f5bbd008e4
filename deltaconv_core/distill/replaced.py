"""Other callables in the place of some modules' `forward`, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def replaced(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Puts a callable in place of each module's forward; on leaving, every module has again what it had."""
    forwards = list(forwards)
    before = [module.__dict__.get("forward") for module, _ in forwards]
    try:
        for module, forward in forwards:
            module.__dict__["forward"] = forward
        yield
    finally:
        for (module, _), own in zip(forwards, before, strict=True):
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own


@contextmanager
def gradient_checkpointing(segments: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, these modules keep only their inputs for the backward pass, which runs them once more.

    Dictionaries among the arguments (ComfyUI's transformer_options, written to while the network runs) are
    copied, so that the second run reads what the first one did.
    """
    with replaced((module, _Recomputed(module.forward)) for module in list(segments)):
        yield


class _Recomputed:
    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **call: Any) -> Any:
        before = {name: dict(value) for name, value in call.items() if isinstance(value, dict)}

        def run(*args: Any) -> Any:
            return self.forward(*args, **call | {name: dict(value) for name, value in before.items()})

        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)
