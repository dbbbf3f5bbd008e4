"""The statistics of one layer's attention, gathered call by call and some queries at a time.

No more than `BUDGET` bytes of attention maps exist at once, whatever the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

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

MAP_BYTES = 64 << 20  # bytes of one chunk of maps; some six times as much is in use at once
LEAST_SHARE = 1e-4  # a layer whose high-frequency part is a smaller share of its attention has none


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
        check: called before each chunk and before the result is made; may raise to stop.
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
        self._calls: dict[str, list[_Sums]] = {}

    @property
    def seen(self) -> bool:
        """Whether there was any call."""
        return bool(self._calls)

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
        chunk = max(1, MAP_BYTES // (4 * len(q) * q.shape[1] * k.shape[2]))
        parts = []
        for at in torch.split(self._chosen.to(q.device), chunk):
            self.check()
            rows = None if mask is None else mask if mask.shape[-2] == 1 else mask[..., image, :][..., at, :]
            maps, outside = attention_maps(q[:, :, image][:, :, at], keys, image, rows)
            parts.append(self._look(maps.reshape(*maps.shape[:-1], *grid), outside, at))
        self._calls.setdefault(moment, []).append(_Sums.of(parts))

    def result(self) -> LayerLocality:
        """What was gathered.

        Raises:
            DeltaConvError: there was no call, or the attention was NaN.
        """
        if not self._calls or self._grid is None:
            raise DeltaConvError(f"the attention at {self.site} was never called; run the model first")
        self.check()
        calls = [sums for moment in self._calls.values() for sums in moment]
        total = _Sums.of(calls)
        if not total.mass.isfinite().all():
            raise DeltaConvError(
                f"the attention at {self.site} holds NaN: the model computes it out of the range of its "
                "dtype (try bfloat16 or float32), or its weights are damaged"
            )
        # The same queries are looked at each time, so errors of several calls may all go the same way.
        mass_error, high_error = (
            torch.stack(errors).sum(dim=0) / total.seen
            for errors in zip(*(sums.errors() for sums in calls), strict=True)
        )
        mean = self._around.total / self._around.count.clamp(min=1)
        return LayerLocality(
            site=self.site,
            channels=self.channels,
            grid=self._grid,
            heads=len(total.mass),
            queries=len(self._chosen),
            mass=total.mass.mean(dim=0) / total.seen,
            mass_error=mass_error,
            mass_by_head=total.mass / total.seen,
            high=total.high_curve(),
            high_error=high_error,
            high_without_sinks=total.sinkless_curve(),
            high_share=total.high[-1].item() / total.seen,
            first=total.first.item() / total.seen,
            last=total.last.item() / total.seen,
            outside=total.outside.item() / total.seen,
            around=mean.cpu().double(),
            components=fit_components(mean, self._around.count, total.seen),
            by_moment={name: _Sums.of(moment).high_curve() for name, moment in self._calls.items()},
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

    def _look(self, maps: Tensor, outside: Tensor, at: Tensor) -> _Sums:
        """A chunk of maps, (B, heads, Q, H, W)."""
        width = maps.shape[-1]
        y, x = at // width, at % width
        mean = maps.mean(dim=1)
        for one in mean:
            self._around.add(one, y.tolist(), x.tolist())
        mass = window_mass(maps, y, x)
        high = self._high_pass(mean).clamp(min=0)
        return _Sums.of_chunk(maps, mass, high, window_mass(high, y, x), outside, at)


@dataclass
class _Sums:
    """Sums over queries and batch, float64 on the CPU; see `LayerLocality` for what they become.

    Squares and products are of means over the batch: its pictures are looked at by the same queries.
    """

    seen: int
    batch: int  # of one call
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
        shared = window.mean(dim=0)
        flat = maps.flatten(-2)
        return cls(
            seen=batch * len(at),
            batch=batch,
            population=height * width,
            mass=_total(mass, (0, 2)),
            mass_squares=_total(mass.mean(dim=(0, 1)).square(), (0,)),
            high=_total(window, (0, 1)),
            high_squares=_total(shared.square(), (0,)),
            high_times_whole=_total(shared * shared[:, -1:], (0,)),
            sinkless=_total(window - _in_sinks(high, at), (0, 1)),
            first=_total(flat[..., 0]) / heads,
            last=_total(flat[..., -1]) / heads,
            outside=_total(outside) / heads,
        )

    @classmethod
    def of(cls, parts: Sequence[_Sums]) -> _Sums:
        """All together; batch and population stay, as all parts look at the same tokens."""
        added = {f.name: sum(getattr(part, f.name) for part in parts) for f in fields(cls)}
        return cls(**{**added, "batch": parts[0].batch, "population": parts[0].population})

    def high_curve(self) -> Tensor:
        return _curve(self.high, self.seen)

    def sinkless_curve(self) -> Tensor:
        return _curve(self.sinkless, self.seen)

    def errors(self) -> tuple[Tensor, Tensor]:
        """Standard errors in one call of `mass` and of `high` (a ratio: by linearization), times `seen`."""
        queries = self.seen // self.batch
        mean = self.mass.mean(dim=0) / self.batch
        _, mass = mean_and_error(mean, self.mass_squares, queries, self.population)
        ratio = self.high_curve()
        squares = (
            self.high_squares - 2 * ratio * self.high_times_whole + ratio.square() * self.high_times_whole[-1]
        )
        _, high = mean_and_error(torch.zeros_like(squares), squares.clamp(min=0), queries, self.population)
        whole = (self.high[-1] / self.seen).clamp(min=LEAST_SHARE)
        return mass * self.seen, high / whole * self.seen


def _total(values: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    return (values.sum() if dims is None else values.sum(dim=dims)).cpu().double()


def _curve(sums: Tensor, seen: int) -> Tensor:
    """As a share of the whole; a layer without a high-frequency part has all of it in every window."""
    return sums / sums[-1] if sums[-1] > LEAST_SHARE * seen else torch.ones_like(sums)


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
