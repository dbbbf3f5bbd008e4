"""What one call of the network must know at its sites when more than a fixed block may run there.

ComfyUI hands the noise level to U-Nets' attention, but not to PixArt's, and reading it at every site would
wait for the GPU every time. So it is read once per call of the model, and kept for the time of that call.
With gradient checkpointing, layers run once more during the backward pass, long after the call: so whatever
the call saves for the backward pass carries what was known, and the layers that run again find it there.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from ....deltaconv_core.errors import DeltaConvError
from ....deltaconv_core.sites.sampling_range import Choice
from ..model.joint import Tokens
from ..model.sites import Site
from ..model.standing import Forward


@dataclass(frozen=True)
class Call:
    """One call of a model.

    Args:
        choice: what runs at the sites.
        own: the attention's own forward, by path, where a mixer runs inside it.
        behind: what would run without the patch, by path, where something else than the mixer may run.
        grids: (H, W) at the sites that have run already, by id.
        tokens: of a model with joint attention, what is known of them.
    """

    choice: Choice = True
    own: dict[str, Forward] = field(default_factory=dict)
    behind: dict[str, Forward] = field(default_factory=dict)
    grids: dict[str, tuple[int, int]] = field(default_factory=dict)
    tokens: Tokens | None = None


class Calls(dict[object, Call]):
    """The running calls by owner: the patch, and all copies of it, that a call belongs to."""


_calls: ContextVar[Calls] = ContextVar("deltaconv_calls", default=Calls())  # noqa: B039 (never changed)
_recalled = (
    threading.local()
)  # in a backward pass: its number, and the calls whose tensors were asked for last


@contextmanager
def running(owner: object, call: Call) -> Iterator[None]:
    """Inside, and in what is recomputed of it during a backward pass, the call is the owner's."""
    calls = Calls({**_calls.get(), owner: call})
    token = _calls.set(calls)
    try:
        with _remembered(calls) if torch.is_grad_enabled() else nullcontext():
            yield
    finally:
        _calls.reset(token)


def current_call(owner: object, advice: str) -> Call:
    """The running call of the owner's model.

    Raises:
        DeltaConvError: the model is run in a way that ComfyUI's wrappers do not see.
    """
    call = _calls.get().get(owner) or _recomputed().get(owner)
    if call is None:
        raise DeltaConvError(
            "something runs this MODEL's network directly, past ComfyUI's wrappers, so neither the noise "
            f"level nor the attention behind a patch is known; {advice}"
        )
    return call


def grid_at(owner: object, site: Site, x: torch.Tensor, call: dict[str, Any]) -> tuple[int, int]:
    """(H, W) of the tokens x (B, N, C) at a site, from the keyword arguments of its call.

    U-Nets change what those arguments refer to while they run, so for a layer that is recomputed it is what
    it was the first time.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return site.grid_of(x, call)
    if (before := _recomputed().get(owner)) and site.id in before.grids:
        return before.grids[site.id]
    grid = site.grid_of(x, call)
    if now := _calls.get().get(owner):
        now.grids[site.id] = grid
    return grid


@contextmanager
def _remembered(calls: Calls) -> Iterator[None]:
    """Inside, tensors saved for a backward pass carry the calls."""

    def pack(saved: torch.Tensor) -> tuple[torch.Tensor, Calls]:
        return saved.detach(), calls  # itself, it could be the output of the very node that saves it

    def unpack(packed: tuple[torch.Tensor, Calls]) -> torch.Tensor:
        _recalled.during, _recalled.calls = _backward_pass(), weakref.ref(packed[1])
        return packed[0]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _recomputed() -> Calls:
    """The calls whose layers a backward pass runs again: it asked for their inputs just before."""
    now = _backward_pass()
    if now == -1 or getattr(_recalled, "during", None) != now:
        return Calls()
    return _recalled.calls() or Calls()


def _backward_pass() -> int:
    """The number of the backward pass that runs in this thread; -1: none does."""
    return int(torch._C._current_graph_task_id())
