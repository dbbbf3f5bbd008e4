"""Where joint mixers run: only where one is faster than the attention, by times taken on this very machine.

The first call of each kind is timed both ways, whatever follows of that kind goes by the result. Attention's
time is that of some of its queries, since it grows with their number, so that the timing itself stays small
beside one call of attention. Code that is being compiled cannot be timed; there operations are counted.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...bench.timing import alternate
from ..hybrid.cells import cells_of
from .flops import joint_flops
from .module import JointMixer, MaskedAttention, attention
from .place import JointLayout, four_dimensional
from .spec import JointSpec

FASTER = 0.95
"""A mixer counts as faster where it takes less than this part of attention's time: measuring is not exact."""
TIMED_QUERIES = 4096
"""Queries whose attention is timed: enough to keep a GPU busy."""
TIMED_CALLS = 3


@dataclass(frozen=True)
class Verdict:
    """Which of the two runs in calls of one kind, and why.

    Args:
        mixer: whether the mixer does.
        seconds: of a call of the attention and of the mixer; none where they were not timed.
        reason: for people, without names of layers.
    """

    mixer: bool
    seconds: tuple[float, float] | None
    reason: str


@dataclass(frozen=True)
class CallKind:
    """All that the time of a call depends on."""

    spec: JointSpec
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    layout: JointLayout
    mask: tuple[int, ...] | None
    dtype: torch.dtype
    device: torch.device


class Plan:
    """What was found for each kind of call; shared by all layers of a model.

    Args:
        always: mixers run wherever they can, which nothing is timed for.
    """

    def __init__(self, always: bool = False) -> None:
        self.always = always
        self.verdicts: dict[CallKind, Verdict] = {}

    @torch.no_grad()
    def verdict(
        self,
        mixer: JointMixer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: JointLayout,
        mask: Tensor | None = None,
        attend: MaskedAttention = attention,
    ) -> Verdict:
        """Which of the two should run in this call; arguments as `JointMixer.forward` takes them."""
        if self.always:
            return Verdict(True, None, "it was asked for")
        # Mixers of one model differ in kernels, not in what they cost.
        spec = replace(mixer.spec, dim=1)
        shape = None if mask is None else tuple(mask.shape)
        kind = CallKind(spec, tuple(q.shape), tuple(k.shape), layout, shape, q.dtype, q.device)
        if torch.compiler.is_compiling():
            return by_operations(mixer.spec, layout, k.shape[2] - layout.tokens)
        if kind not in self.verdicts:
            self.verdicts[kind] = self._found(mixer, q, k, v, layout, mask, attend)
        return self.verdicts[kind]

    def _found(
        self,
        mixer: JointMixer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: JointLayout,
        mask: Tensor | None,
        attend: MaskedAttention,
    ) -> Verdict:
        if cells_of(layout.grid, mixer.spec.landmarks) == layout.grid:
            return Verdict(False, None, "the image has no more tokens than the mixer has landmarks")
        some, part = q[:, :, :TIMED_QUERIES], mask
        if mask is not None and four_dimensional(mask).shape[2] > 1:
            part = four_dimensional(mask)[:, :, :TIMED_QUERIES]
        try:
            taken = alternate(
                {
                    "attention": lambda: attend(some, k, v, part),
                    "mixer": lambda: mixer(q, k, v, layout, mask, attend),
                },
                q.device,
                TIMED_CALLS,
            )
        except torch.OutOfMemoryError:
            return Verdict(False, None, "timing it at this size takes more memory than there is")
        own, theirs = (statistics.median(taken[name]) for name in ("mixer", "attention"))
        theirs *= q.shape[2] / some.shape[2]
        compared = f"attention takes {1000 * theirs:.3g} ms a layer, the mixer {1000 * own:.3g} ms"
        if own < FASTER * theirs:
            return Verdict(True, (theirs, own), compared)
        return Verdict(False, (theirs, own), f"the mixer is not faster at this size: {compared}")


def by_operations(spec: JointSpec, layout: JointLayout, exact: int) -> Verdict:
    """The verdict by counting, for an image among so many exact tokens."""
    own, theirs = (joint_flops(one, layout.grid, exact, spec.inner) for one in (spec, None))
    compared = f"by operations the mixer costs {own / theirs:.0%} of attention"
    return Verdict(
        own < FASTER * theirs and cells_of(layout.grid, spec.landmarks) != layout.grid, None, compared
    )
