"""The statistics of one layer's attention, gathered call by call and some queries at a time.

No more than `BUDGET` bytes of attention maps exist at once, whatever the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import DeltaConvError
from .around import AroundQuery
from .components import fit_components
from .highpass import CUTOFF, ORDER, HighPass
from .maps import attention_maps
from .queries import EXACT_LIMIT, SAMPLE, choose_queries, mean_and_error
from .result import LayerLocality
from .windows import window_mass

BUDGET = 64 << 20  # bytes of one chunk of maps; some six times as much is in use at once
NOTHING = 1e-4  # a layer whose high-frequency part is a smaller share of its attention has none


def _proceed() -> None:
    pass


@dataclass
class LayerStatistics:
    """Gathers what `LayerLocality` holds.

    Args:
        site: diffusers module path of the attention.
        channels: of its tokens.
        order, cutoff: of the high-pass, see `HighPass`.
        exact_limit, sample, seed: which queries are looked at, see `choose_queries`.
        check: called before each chunk; may raise to stop.
    """

    site: str
    channels: int
    order: int = ORDER
    cutoff: float = CUTOFF
    exact_limit: int = EXACT_LIMIT
    sample: int = SAMPLE
    seed: int = 0
    check: Callable[[], None] = _proceed

    def __post_init__(self) -> None:
        self._grid: tuple[int, int] | None = None
        self._chosen = torch.arange(0)
        self._sums: dict[str, _Sums] = {}

    @property
    def seen(self) -> bool:
        """Whether there was any call."""
        return bool(self._sums)

    @torch.no_grad()
    def add(
        self,
        q: Tensor,
        k: Tensor,
        grid: tuple[int, int],
        moment: str = "",
        image: slice | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """One call of the attention.

        Args:
            q, k: (B, heads, tokens, d), any floating dtype and device.
            grid: (H, W) of the image's tokens; the same in every call.
            moment: name of the timestep.
            image: where the H * W tokens of the image are among all; None: there are no others.
            mask: of the attention, see `attention_maps`.

        Raises:
            DeltaConvError: tokens that do not fit the grid, or another grid than before.
        """
        image = self._checked(q, k, grid, image)
        keys = k.float()
        chunk = max(1, BUDGET // (4 * len(q) * q.shape[1] * k.shape[2]))
        for at in torch.split(self._chosen.to(q.device), chunk):
            self.check()
            rows = None if mask is None else mask if mask.shape[-2] == 1 else mask[..., image, :][..., at, :]
            maps, outside = attention_maps(q[:, :, image][:, :, at], keys, image, rows)
            self._add(maps.reshape(*maps.shape[:-1], *grid), outside, at, moment)

    def result(self) -> LayerLocality:
        """What was gathered.

        Raises:
            DeltaConvError: there was no call, or the attention was NaN.
        """
        if not self._sums or self._grid is None:
            raise DeltaConvError(f"the attention at {self.site} was never called")
        moments = list(self._sums.values())
        total = sum(moments[1:], start=moments[0])
        if not total.mass.isfinite().all():
            raise DeltaConvError(
                f"the attention at {self.site} holds NaN: the model computes it out of the range of its "
                "dtype (try bfloat16 or float32), or its weights are damaged"
            )
        errors = [sums.errors() for sums in moments]
        mean = self._around.total / self._around.count.clamp(min=1)
        return LayerLocality(
            site=self.site,
            channels=self.channels,
            grid=self._grid,
            heads=len(total.mass),
            queries=len(self._chosen),
            mass=total.mass.mean(dim=0) / total.seen,
            # The same queries are looked at each time, so errors of several timesteps may go together.
            mass_error=torch.stack([mass for mass, _ in errors]).mean(dim=0),
            mass_by_head=total.mass / total.seen,
            high=total.high_curve(),
            high_error=torch.stack([high for _, high in errors]).mean(dim=0),
            high_without_sinks=total.sinkless_curve(),
            high_share=total.high[-1].item() / total.seen,
            first=total.first.item() / total.seen,
            last=total.last.item() / total.seen,
            outside=total.outside.item() / total.seen,
            around=mean.double().cpu(),
            components=fit_components(mean, self._around.count, total.seen),
            by_moment={name: sums.high_curve() for name, sums in self._sums.items()},
        )

    def _checked(self, q: Tensor, k: Tensor, grid: tuple[int, int], image: slice | None) -> slice:
        tokens = grid[0] * grid[1]
        image = slice(0, q.shape[2]) if image is None else image
        if image.stop - image.start != tokens or q.shape[2] < image.stop or q.shape[2] != k.shape[2]:
            raise DeltaConvError(
                f"{self.site}: expected {grid[0]} x {grid[1]} = {tokens} tokens of the image among as many "
                f"queries as keys, got {q.shape[2]} queries and {k.shape[2]} keys, of which {image.start} to "
                f"{image.stop} were taken for the image"
            )
        if self._grid is None:
            self._grid = grid
            self._chosen = choose_queries(tokens, self.exact_limit, self.sample, self.seed)
            self._around = AroundQuery(grid, q.device)
            self._high_pass = HighPass(grid, self.order, self.cutoff, q.device)
        if grid != self._grid:
            raise DeltaConvError(
                f"{self.site}: the token grid was {self._grid[0]} x {self._grid[1]} and is now "
                f"{grid[0]} x {grid[1]}; look at one size at a time, without areas in the conditioning"
            )
        return image

    def _add(self, maps: Tensor, outside: Tensor, at: Tensor, moment: str) -> None:
        """A chunk of maps, (B, heads, Q, H, W)."""
        width = maps.shape[-1]
        y, x = at // width, at % width
        mean = maps.mean(dim=1)
        for one in mean:
            self._around.add(one, y.tolist(), x.tolist())
        mass = window_mass(maps, y, x)
        high = self._high_pass(mean).clamp(min=0)
        part = _Sums.of_chunk(maps, mass, high, window_mass(high, y, x), outside, at)
        self._sums[moment] = self._sums[moment] + part if moment in self._sums else part


@dataclass
class _Sums:
    """Sums over queries and batch, float64 on the CPU; see `LayerLocality` for what they become."""

    seen: int
    population: int
    mass: Tensor  # (heads, R)
    mass_squares: Tensor  # (R,) of the mean over heads
    high: Tensor  # (R,) the last entry is the whole high-frequency part
    high_squares: Tensor
    high_times_whole: Tensor
    sinkless: Tensor
    first: Tensor
    last: Tensor
    outside: Tensor

    @classmethod
    def of_chunk(
        cls, maps: Tensor, mass: Tensor, high: Tensor, window: Tensor, outside: Tensor, at: Tensor
    ) -> _Sums:
        """Args: maps (B, heads, Q, H, W), mass (B, heads, Q, R), high (B, Q, H, W), window (B, Q, R), outside
        (B, heads, Q), at (Q,)."""
        batch, heads, _, height, width = maps.shape
        whole = window[..., -1:]
        flat = maps.flatten(-2)
        return cls(
            seen=batch * len(at),
            population=batch * height * width,
            mass=_total(mass, (0, 2)),
            mass_squares=_total(mass.mean(dim=1).square(), (0, 1)),
            high=_total(window, (0, 1)),
            high_squares=_total(window.square(), (0, 1)),
            high_times_whole=_total(window * whole, (0, 1)),
            sinkless=_total(window - _in_sinks(high, at), (0, 1)),
            first=_total(flat[..., 0]) / heads,
            last=_total(flat[..., -1]) / heads,
            outside=_total(outside) / heads,
        )

    def __add__(self, other: _Sums) -> _Sums:
        """The population stays: it is looked at again at another timestep, or in another chunk."""
        added = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return _Sums(**{**added, "population": self.population})

    def high_curve(self) -> Tensor:
        return _curve(self.high, self.seen)

    def sinkless_curve(self) -> Tensor:
        return _curve(self.sinkless, self.seen)

    def errors(self) -> tuple[Tensor, Tensor]:
        """Standard errors of `mass` and of `high`; the latter is a ratio of two sums, so by linearization."""
        _, mass = mean_and_error(self.mass.mean(dim=0), self.mass_squares, self.seen, self.population)
        whole = self.high[-1]
        ratio = self.high_curve()
        squares = (
            self.high_squares - 2 * ratio * self.high_times_whole + ratio.square() * self.high_times_whole[-1]
        )
        _, high = mean_and_error(torch.zeros_like(squares), squares.clamp(min=0), self.seen, self.population)
        return mass, high / (whole / self.seen).clamp(min=NOTHING)


_T = TypeVar("_T")


def _total(values: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    return (values.sum() if dims is None else values.sum(dim=dims)).double().cpu()


def _curve(sums: Tensor, seen: int) -> Tensor:
    """As a share of the whole; a layer without a high-frequency part has all of it in every window."""
    return sums / sums[-1] if sums[-1] > NOTHING * seen else torch.ones_like(sums)


def _in_sinks(high: Tensor, at: Tensor) -> Tensor:
    """(B, Q, R): how much of every window is attention to the first and to the last token from others."""
    height, width = high.shape[-2:]
    y, x = at // width, at % width
    radii = torch.arange(max(height, width), device=high.device)
    first = torch.maximum(y, x)
    last = torch.maximum(height - 1 - y, width - 1 - x)
    flat = high.flatten(-2)
    to_first = (flat[..., 0] * (first > 0))[..., None] * (radii >= first[:, None])
    to_last = (flat[..., -1] * (last > 0))[..., None] * (radii >= last[:, None])
    return to_first + to_last
