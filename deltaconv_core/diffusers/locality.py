"""Looking at the self-attention of a diffusers pipeline while it draws a picture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DeltaConvError
from ..locality.result import LayerLocality
from ..locality.sampled_steps import spread
from ..locality.statistics import LayerStatistics
from ..sites import select
from .draw import draw_picture
from .sites import Sites, find_sites, network_of
from .watch import watched


@dataclass(frozen=True)
class LookSettings:
    """What is drawn, and when the attention is looked at.

    Args:
        prompt: of the picture.
        width, height: in pixels; None: the pipeline's own.
        steps: of the sampling.
        looks: at how many of them the attention is looked at.
        seed: of the noise.
    """

    prompt: str
    width: int | None = None
    height: int | None = None
    steps: int = 20
    looks: int = 4
    seed: int = 0


def look(pipeline: Any, settings: LookSettings, blocks: str = "all") -> tuple[str, list[LayerLocality]]:
    """Draws the picture without guidance and gathers statistics of the self-attention on the way.

    Args:
        pipeline: a diffusers pipeline with a U-Net or PixArt.
        settings: what is drawn.
        blocks: the sites, in the language of `deltaconv_core.sites.select`.

    Returns:
        The architecture, and the layers in the order of the network.

    Raises:
        DeltaConvError: a pipeline whose attention cannot be looked at or that cannot draw this picture, or a
            selection that names no site.
    """
    network = network_of(pipeline)
    found = find_sites(network)
    chosen = select(blocks, found.channels)
    statistics = {id: LayerStatistics(id, found.channels[id]) for id in chosen}
    with _watching(network, found, LocalityWatch(pipeline, settings.looks, statistics)), torch.no_grad():
        draw_picture(
            pipeline,
            settings.prompt,
            steps=settings.steps,
            seed=settings.seed,
            guidance_scale=1.0,
            width=settings.width,
            height=settings.height,
        )
    return found.architecture, [one.result() for one in statistics.values()]


@dataclass
class LocalityWatch:
    """The hooks, and what they know of the running call."""

    pipeline: Any
    looks: int
    statistics: dict[str, LayerStatistics]
    calls: int = 0
    moment: str | None = None

    def network_called(self, module: nn.Module, args: tuple[Any, ...], call: dict[str, Any]) -> None:
        """One call for each of the scheduler's timesteps, as there is no guidance."""
        count = len(self.pipeline.scheduler.timesteps)
        at = spread(count, self.looks)
        self.moment = f"{self.calls + 1}/{count}" if self.calls in at else None
        self.calls += 1

    def see(
        self,
        id: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: tuple[int, int],
        mask: Tensor | None,
    ) -> None:
        """One call of an attention."""
        if mask is not None:
            raise DeltaConvError(
                f"the self-attention {id} was called with a mask, under which locality cannot be measured; "
                "call the pipeline without one"
            )
        self.statistics[id].add(q, k, grid, self.moment or "")


@contextmanager
def _watching(network: nn.Module, found: Sites, watch: LocalityWatch) -> Iterator[None]:
    handle = network.register_forward_pre_hook(watch.network_called, with_kwargs=True)
    try:
        with watched(found, watch.statistics, watch.see, lambda: watch.moment is not None):
            yield
    finally:
        handle.remove()
