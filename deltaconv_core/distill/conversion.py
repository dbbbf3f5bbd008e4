"""Converting a model: hybrid or joint mixers fitted to its attention, timed, and chosen within a budget.

Nothing is trained. The model samples a few pictures; on the way several mixers are fitted to each attention
(`hybrid`, `joint_fit`). Then attention and mixers are timed on random queries, keys and values, at the size
of those pictures and at twice that size, and a budget decides where a mixer stands in for attention, and
which one: never one that is not faster at the size of the pictures. What follows from the seed are the
mixers; the choice also depends on the times, which this machine gives.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..bench import Span, alternate, synchronize
from ..errors import DeltaConvError
from ..mixers.hybrid import HybridMixer, HybridSpec
from ..mixers.hybrid.cells import cells_of
from ..mixers.joint import JointLayout, JointMixer, JointSpec
from ..mixers.joint.plan import FASTER, TIMED_CALLS
from ..weights.checkpoint import Checkpoint
from .budget import Attention, Decision, within_cost, within_error
from .hybrid import Chosen, FitSettings, Fitted, HybridFit, MixerSpec, SeeCall, choose, fit_hybrids

QUALITY, SPEED = "quality", "speed"
LANDMARKS = (36, 64, 144, 256, 576)
PLAIN_LANDMARKS = (64, 144)
LONGEST_CALL = 10.0
"""Seconds: longer calls at twice the size are not timed but reckoned from those at the size itself."""

Attending = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of q, k, v (B, heads, N, d) -> the answers in any layout, as the model computes it."""


T = TypeVar("T")

JOINT_LANDMARKS = (64, 256, 1024)
JOINT_KERNELS = (0, 9)
JOINT_WINDOW, WINDOW_LANDMARKS = 7, (64, 256)


def joint_candidates(dim: int, heads: int, head_dim: int) -> list[JointSpec]:
    """The mixers that are fitted to one joint attention: from few landmarks to many, alone, with local
    kernels, and with a window of single tokens; arguments as for `candidates`."""
    spec = partial(JointSpec, dim, heads, head_dim)
    return [
        *(spec(landmarks=n, kernel_size=size) for n in JOINT_LANDMARKS for size in JOINT_KERNELS),
        *(spec(landmarks=n, window=JOINT_WINDOW, kernel_size=0) for n in WINDOW_LANDMARKS),
    ]


def candidates(dim: int, heads: int, head_dim: int) -> list[HybridSpec]:
    """The mixers that are fitted to one attention: from few landmarks to many, with Nyström's correction, and
    plain landmarks with kernels on the values.

    Args:
        dim: channels of its tokens.
        heads, head_dim: of its queries, keys and values.
    """
    local: dict[str, Any] = {"nystrom": "none", "kernel_size": 5, "mean": True}
    return [
        *(HybridSpec(dim, heads, head_dim, landmarks=n) for n in LANDMARKS),
        *(HybridSpec(dim, heads, head_dim, landmarks=n, **local) for n in PLAIN_LANDMARKS),
    ]


def in_turn(sizes: Sequence[T], number: int) -> T:
    """The size of the picture of a number: of those held out, one in four, the first has the first size, and
    each size has its part.
    """
    return sizes[(number + 1 + number // FitSettings.held_out) % len(sizes)]


@dataclass(frozen=True)
class Wishes:
    """What the user wants.

    Args:
        budget: "quality": the fastest mixer whose error is small enough, wherever one is faster than
            attention. "speed": the least error at which all self-attentions take a part of their time.
        limit: the largest relative error of a layer; or the part of the time, 0 to 1.
        pictures: that the model samples.
        seed: of the queries that are looked at; the host's noise follows from it too.

    Raises:
        DeltaConvError: an unknown budget.
    """

    budget: str = QUALITY
    limit: float = 0.05
    pictures: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.budget not in (QUALITY, SPEED):
            raise DeltaConvError(f"expected a budget of {QUALITY!r} or {SPEED!r}, got {self.budget!r}")
        self.decide({})

    def decide(self, sites: Mapping[str, Attention]) -> dict[str, Decision]:
        """What the budget says."""
        return (within_error if self.budget == QUALITY else within_cost)(sites, self.limit)


@dataclass(frozen=True)
class ConvertedLayer:
    """One self-attention, and what became of it.

    Args:
        site: its id.
        grid: (H, W) of its tokens.
        mixer: what stands in for it; None: it stays.
        error: of the mixer, relative, on held-out pictures.
        calls: of it in a picture.
        seconds, twice: of a call of the attention and of the mixer, at the size of the pictures and at twice
            the height and width; where the attention stays, both are its own.
    """

    site: str
    grid: tuple[int, int]
    mixer: MixerSpec | None
    error: float
    calls: int
    seconds: tuple[float, float]
    twice: tuple[float, float]


@dataclass(frozen=True)
class Conversion:
    """What became of a model.

    Args:
        mixers, kept: as `Checkpoint` takes them.
        layers: in the order of the network; those that were never called are not among them.
        picture: seconds that sampling a picture took with attention everywhere.
        wishes: what was wanted.
        more: layers that stay attention at this size, and would not at twice the height and width.
        images: (H, W) in tokens of the images that joint mixers were fitted to, the largest first.
    """

    mixers: dict[str, HybridMixer | JointMixer]
    kept: dict[str, str]
    layers: list[ConvertedLayer]
    picture: float
    wishes: Wishes
    more: int
    images: tuple[tuple[int, int], ...] = ()

    @property
    def seconds(self) -> tuple[float, float]:
        """Of a picture with attention, as measured, and with the mixers, by the times of the layers."""
        attention, now = self._of_layers(layer.seconds for layer in self.layers)
        # Timed by themselves, the attentions may take longer than the picture that they are a part of.
        share = self.picture / max(self.picture, attention)
        return self.picture, self.picture - share * (attention - now)

    @property
    def twice(self) -> tuple[float, float]:
        """The same for twice the height and width, where all but attention takes four times as long."""
        rest = 4 * max(0.0, self.picture - self._of_layers(layer.seconds for layer in self.layers)[0])
        attention, now = self._of_layers(layer.twice for layer in self.layers)
        return rest + attention, rest + now

    def _of_layers(self, times: Iterable[tuple[float, float]]) -> tuple[float, float]:
        """Seconds in a picture of all attentions, and of what stands there, from those of a call by layer."""
        each = [(a * layer.calls, b * layer.calls) for (a, b), layer in zip(times, self.layers, strict=True)]
        return sum(a for a, _ in each), sum(b for _, b in each)

    def checkpoint(self, architecture: str, sites: Iterable[str], metadata: Mapping[str, str]) -> Checkpoint:
        """The mixers as weights, which are empty where all attention stays.

        Args:
            architecture: of the model.
            sites: all that it has.
            metadata: what else there is to say: teacher, source, ...
        """
        errors = [layer.error for layer in self.layers if layer.mixer is not None]
        texts = dict(metadata) | {
            "training": f"none; fitted to {self.wishes.pictures} pictures, seed {self.wishes.seed}",
            "budget": f"{self.wishes.budget}, {self.wishes.limit:g}",
        }
        if errors:
            texts["layer errors"] = (
                f"{min(errors):.2g} to {max(errors):.2g}, mean {statistics.mean(errors):.2g}"
            )
        if self.images:
            texts["sizes"] = ", ".join(f"{height} x {width}" for height, width in self.images)
        known = self.mixers | self.kept
        left_out = {site: "it was left out of the conversion" for site in sites if site not in known}
        kept = self.kept | left_out if self.mixers else {}
        return Checkpoint(architecture, self.mixers, metadata=texts, kept=kept)


def fit_and_choose(
    sites: Mapping[str, Sequence[MixerSpec]],
    watched: Callable[[SeeCall], AbstractContextManager[None]],
    sample: Callable[[int], None],
    wishes: Wishes,
    attend: Attending = F.scaled_dot_product_attention,
    check: Callable[[], object] = lambda: None,
    on_picture: Callable[[int], None] | None = None,
    fitting: type[HybridFit] = HybridFit,
) -> Conversion:
    """Fits, times and chooses; the model stays as it is.

    Args:
        sites: site id -> mixers that may stand there (`candidates`), in the order of the network.
        watched, sample, on_picture: as `hybrid.fit_hybrids` takes them.
        wishes: of the user.
        attend: the attention as the model computes it, which is timed.
        check: called often; raises to stop.
        fitting: `JointFit` for joint mixers. Of pictures of several sizes, the times of the largest decide.

    Raises:
        DeltaConvError: a budget or number of pictures out of range, or no attention that was ever called.
    """
    settings = FitSettings(seed=wishes.seed)
    if wishes.pictures < settings.held_out:
        raise DeltaConvError(
            f"expected at least {settings.held_out} calibration pictures, of which one in "
            f"{settings.held_out} is held out to measure the error, got {wishes.pictures}"
        )
    fit = fitting(sites, settings)
    meter = _Meter(fit, sample, check)
    fitted = fit_hybrids(
        fit, lambda see: watched(meter.see), meter.sample, wishes.pictures, on_picture=on_picture
    )
    fit.forget()  # a model's hooks may keep the fit for a while, and timing needs memory
    if not fitted:
        raise DeltaConvError(
            f"none of the {len(sites)} self-attentions was called in the usual way; something on this model "
            "replaces them: convert the model without it"
        )
    fitted = {site: fitted[site] for site in sites if site in fitted}
    times = _Times(meter.calls, attend, check)
    here = {site: times(site, sites[site]) for site in fitted}
    twice = {site: times(site, sites[site], twice=True) for site in fitted}
    chosen, later = (_chosen(fit, fitted, wishes, known) for known in (here, twice))
    layers = []
    for site, some in fitted.items():
        number = chosen.decisions[site].option
        mixer = None if number is None else some[number].mixer.spec
        error = 0.0 if number is None else some[number].error
        seconds, larger = ((known[site][None], known[site][mixer]) for known in (here, twice))
        layers.append(
            ConvertedLayer(site, fit.grids[site], mixer, error, meter.counts[site], seconds, larger)
        )
    more = len(later.mixers.keys() - chosen.mixers.keys())
    images = sorted(meter.images, key=math.prod, reverse=True)
    return Conversion(chosen.mixers, chosen.kept, layers, meter.picture, wishes, more, tuple(images))


Known = Mapping[str, Mapping[MixerSpec | None, float]]
"""Site -> mixer, or None for the attention -> seconds of a call."""


def _chosen(fit: HybridFit, fitted: Mapping[str, Sequence[Fitted]], wishes: Wishes, known: Known) -> Chosen:
    """What the budget says, by these times; no mixer that is not faster than its attention."""

    def cost(site: str, spec: MixerSpec | None) -> float:
        own, attention = known[site][spec], known[site][None]
        faster = own < FASTER * attention and not _is_attention(spec, fit.grids[site])
        return own if spec is None or faster else max(own, attention)

    return choose(fit, fitted, wishes.decide, cost)


def _is_attention(spec: MixerSpec | None, grid: tuple[int, int]) -> bool:
    """Whether a mixer has a landmark for each token, so that it is the attention, at the same cost."""
    return spec is not None and cells_of(grid, spec.landmarks) == grid


@dataclass(frozen=True)
class _Call:
    """What a call of an attention looked like: all that its time depends on.

    Args:
        shape: of the queries.
        keys: of keys and values.
        place: the image's (H, W), or where it is among other tokens.
        dtype, device: of the tokens.
    """

    shape: tuple[int, ...]
    keys: tuple[int, ...]
    place: tuple[int, int] | JointLayout
    dtype: torch.dtype
    device: torch.device

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) of the image."""
        return self.place.grid if isinstance(self.place, JointLayout) else self.place

    def larger(self) -> _Call:
        """At twice the height and width of the image."""
        height, width = (2 * side for side in self.grid)
        more = 3 * self.grid[0] * self.grid[1]
        place = (height, width)
        return replace(
            self,
            shape=(*self.shape[:2], self.shape[2] + more, self.shape[3]),
            keys=(*self.keys[:2], self.keys[2] + more, self.keys[3]),
            place=replace(self.place, grid=place) if isinstance(self.place, JointLayout) else place,
        )


class _Meter:
    """Stands between the model and the fit: what calls there are, and how long pictures take without it."""

    def __init__(self, fit: HybridFit, sample: Callable[[int], None], check: Callable[[], object]) -> None:
        self.fit, self._sample, self.check = fit, sample, check
        self.calls: dict[str, _Call] = {}
        self.counts: Counter[str] = Counter()  # calls in a picture
        self._called: Counter[str] = Counter()  # in the running one
        self.images: dict[tuple[int, int], None] = {}
        self._pictures: list[tuple[int, float]] = []
        self._queries = 0
        self._spans: list[Span] = []

    def see(self, site: str, q: Tensor, k: Tensor, v: Tensor, grid: Any, mask: Tensor | None) -> None:
        self.check()
        call = _Call(tuple(q.shape), tuple(k.shape), grid, q.dtype, q.device)
        self.calls[site] = max(self.calls.get(site, call), call, key=lambda one: one.shape[2])
        self._called[site] += 1
        if isinstance(grid, JointLayout):
            self.images[grid.grid] = None
        self._queries = max(self._queries, q.shape[2])
        with Span(q.device) as span:
            self.fit.see(site, q, k, v, grid, mask)
        self._spans.append(span)

    def sample(self, number: int) -> None:
        self._called.clear()
        self._spans.clear()
        self._queries = 0
        start = time.perf_counter()
        self._sample(number)
        self.counts |= self._called
        for device in {call.device for call in self.calls.values()}:
            synchronize(device)
        whole = time.perf_counter() - start
        self._pictures.append((self._queries, whole - sum(span.seconds for span in self._spans)))

    @property
    def picture(self) -> float:
        """Seconds of a picture of the largest size."""
        largest = max(queries for queries, _ in self._pictures)
        # The lower one of two: the first picture may include loading the model.
        return statistics.median_low(seconds for queries, seconds in self._pictures if queries == largest)


class _Times:
    """Times calls of attention and of mixers on random tokens; equal calls once.

    Args:
        calls: what they look like, by site.
        attend: the attention.
        check: called before each call that is timed.
    """

    def __init__(self, calls: Mapping[str, _Call], attend: Attending, check: Callable[[], object]) -> None:
        self.calls, self.attend, self.check = calls, attend, check
        self._known: dict[tuple[_Call, Sequence[MixerSpec]], dict[MixerSpec | None, float]] = {}

    def __call__(
        self, site: str, specs: Sequence[MixerSpec], *, twice: bool = False
    ) -> dict[MixerSpec | None, float]:
        """Seconds of a call by mixer, and None for the attention.

        Args:
            site: whose calls are timed.
            specs: of the mixers that may stand there.
            twice: at twice the height and width, by what is known of the size itself where it takes long.
        """
        call = self.calls[site]
        whole = call.larger() if twice else call
        if (key := (whole, tuple(specs))) not in self._known:
            all_of_them: list[MixerSpec | None] = [None, *specs]
            if twice:
                # Attention takes the square of the tokens, mixers their number.
                reckoned = {
                    spec: seconds * (16 if spec is None else 4) for spec, seconds in self(site, specs).items()
                }
                quick = [spec for spec in all_of_them if reckoned[spec] <= LONGEST_CALL]
                try:
                    self._known[key] = reckoned | self._timed(whole, quick, 1)
                except torch.OutOfMemoryError:  # for the tokens alone
                    self._known[key] = reckoned | dict.fromkeys(quick, math.inf)
            else:
                self._known[key] = self._timed(whole, all_of_them, TIMED_CALLS)
        return self._known[key]

    @torch.no_grad()
    def _timed(
        self, call: _Call, specs: Sequence[MixerSpec | None], repeats: int
    ) -> dict[MixerSpec | None, float]:
        random = torch.Generator(call.device).manual_seed(0)
        q, k, v = (
            torch.randn(shape, generator=random, device=call.device).to(call.dtype)
            for shape in (call.shape, call.keys, call.keys)
        )
        failed: set[str] = set()

        def run(name: str, spec: MixerSpec | None) -> Callable[[], None]:
            mixer: Any = None
            if spec is not None:
                made: Any = JointMixer if isinstance(spec, JointSpec) else HybridMixer
                mixer = made(spec, call.device)

            def once() -> None:
                if name in failed:
                    return
                try:
                    self.attend(q, k, v) if mixer is None else mixer(q, k, v, call.place)
                except torch.OutOfMemoryError:
                    failed.add(name)

            return once

        runs = {str(number): run(str(number), spec) for number, spec in enumerate(specs)}
        taken = alternate(runs, call.device, repeats, self.check)
        return {
            spec: math.inf if name in failed else statistics.median(taken[name])
            for name, spec in zip(runs, specs, strict=True)
        }
