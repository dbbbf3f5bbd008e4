"""One network in two modes: at every site a tap that runs the attention, and keeps what it saw, or the
mixer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Grid = Callable[[Tensor, dict[str, Any]], tuple[int, int]]


class Tap:
    """Stands as `forward` of one attention module while its network is distilled.

    Args:
        attention: the module's own forward.
        mixer: (x (B, N, C), grid) -> (B, N, C).
        grid: gives (H, W) from the tokens and the keyword arguments of a call.

    Attributes:
        mixing: False: the attention answers. True: the mixer does.
        seen: the last call's input, grid and output.
    """

    def __init__(self, attention: Callable[..., Tensor], mixer: Callable[..., Tensor], grid: Grid) -> None:
        self.attention = attention
        self.mixer = mixer
        self.grid = grid
        self.mixing = False
        self.seen: tuple[Tensor, tuple[int, int], Tensor] | None = None

    def __call__(self, x: Tensor, *args: Any, **call: Any) -> Tensor:
        grid = self.grid(x, call)
        y = self.mixer(x, grid=grid) if self.mixing else self.attention(x, *args, **call)
        self.seen = x, grid, y
        return y

    def take(self) -> tuple[Tensor, tuple[int, int], Tensor]:
        """What was seen last, which is forgotten with this call."""
        if self.seen is None:
            raise RuntimeError("the network did not run through this tap")
        seen, self.seen = self.seen, None
        return seen


@contextmanager
def tapped(
    attentions: Mapping[str, nn.Module],
    mixers: Mapping[str, Callable[..., Tensor]],
    grids: Mapping[str, Grid],
) -> Iterator[dict[str, Tap]]:
    """Puts a tap at every site; on leaving, every module has the forward again that it had.

    Args:
        attentions, mixers, grids: by site id, the same ids in all three.
    """
    taps = {site: Tap(module.forward, mixers[site], grids[site]) for site, module in attentions.items()}
    replaced = {site: module.__dict__.get("forward") for site, module in attentions.items()}
    try:
        for site, module in attentions.items():
            module.__dict__["forward"] = taps[site]
        yield taps
    finally:
        for site, module in attentions.items():
            if replaced[site] is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = replaced[site]
