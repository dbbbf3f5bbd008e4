"""One network in two modes: at every site a tap that lets the attention answer, or the mixer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .replaced import replaced

GridOf = Callable[[Tensor, dict[str, Any]], tuple[int, int]]
Observer = Callable[[str, Tensor, tuple[int, int], Tensor], None]
"""Is told (site id, input (B, N, C), grid, output (B, N, C)) of a call."""


class Tap:
    """Stands as `forward` of one attention module while its network is distilled.

    Args:
        site: its id.
        attention: the module's own forward.
        mixer: (x (B, N, C), grid) -> (B, N, C).
        grid: gives (H, W) from the tokens and the keyword arguments of a call.

    Attributes:
        mixing: False: the attention answers. True: the mixer does.
        observe: told about every call, unless None.
    """

    def __init__(
        self, site: str, attention: Callable[..., Tensor], mixer: Callable[..., Tensor], grid_of: GridOf
    ) -> None:
        self.site = site
        self.attention = attention
        self.mixer = mixer
        self.grid_of = grid_of
        self.mixing = False
        self.observe: Observer | None = None

    def __call__(self, x: Tensor, *args: Any, **call: Any) -> Tensor:
        grid = self.grid_of(x, call)
        y = self.mixer(x, grid=grid) if self.mixing else self.attention(x, *args, **call)
        if self.observe is not None:
            self.observe(self.site, x, grid, y)
        return y


class Taps:
    """The taps of one network.

    Args:
        taps: by site id.
    """

    def __init__(self, taps: Mapping[str, Tap]) -> None:
        self.taps = dict(taps)

    @contextmanager
    def mode(self, *, mixing: bool, observe: Observer | None = None) -> Iterator[None]:
        """Inside, the mixers answer, or the attention; afterwards the attention does, unobserved."""
        try:
            for tap in self.taps.values():
                tap.mixing, tap.observe = mixing, observe
            yield
        finally:
            for tap in self.taps.values():
                tap.mixing, tap.observe = False, None


@contextmanager
def tapped(
    attentions: Mapping[str, nn.Module],
    mixers: Mapping[str, Callable[..., Tensor]],
    grids: Mapping[str, GridOf],
) -> Iterator[Taps]:
    """Puts a tap at every site that has a mixer; on leaving, every module has the forward that it had.

    Args:
        attentions, grids: by site id; those of sites without a mixer are left alone.
        mixers: by site id.
    """
    taps = {site: Tap(site, attentions[site].forward, mixer, grids[site]) for site, mixer in mixers.items()}
    with replaced((attentions[site], tap) for site, tap in taps.items()):
        yield Taps(taps)
