"""Hybrid mixers for a diffusers pipeline, fitted while it draws pictures, and timed here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..distill import conversion
from ..distill.conversion import Conversion, Wishes
from ..distill.hybrid import SeeCall
from ..errors import DeltaConvError
from ..sites import select
from .applied import blocks_on
from .draw import draw_picture
from .projections import check_plain
from .sites import Sites, find_sites, network_of
from .watch import watched


@dataclass(frozen=True)
class Pictures:
    """What is drawn to fit mixers to.

    Args:
        prompts: taken in turn; at least one.
        negative: likewise of all; "" as most people leave it.
        width, height: in pixels; None: the pipeline's own.
        steps: of the sampling.
    """

    prompts: Sequence[str] = ("a photograph",)
    negative: str = ""
    width: int | None = None
    height: int | None = None
    steps: int = 4

    def options(self) -> dict[str, Any]:
        """Of the pipeline's call."""
        given = {"width": self.width, "height": self.height}
        return {name: side for name, side in given.items() if side is not None} | {
            "negative_prompt": self.negative
        }


def convert(
    pipeline: Any,
    pictures: Pictures,
    wishes: Wishes,
    blocks: str = "all",
    on_picture: Callable[[int], None] | None = None,
) -> tuple[Sites, Conversion]:
    """Fits mixers to a pipeline's self-attention and chooses among them; the pipeline stays as it is.

    Args:
        pipeline: a diffusers pipeline with a U-Net or PixArt, guided as its own default is.
        pictures: what is drawn.
        wishes: budget, number of pictures, seed.
        blocks: the sites, in the language of `deltaconv_core.sites.select`.
        on_picture: told the number of pictures done after each.

    Returns:
        The model's sites, and what became of them; `Conversion.checkpoint` makes weights of it.

    Raises:
        DeltaConvError: a pipeline that cannot be converted or cannot draw these pictures, or wishes that
            cannot be.
    """
    network = network_of(pipeline)
    if blocks_on(network) is not None:
        raise DeltaConvError("ΔConv is on this model already; take it off with `remove`, then convert")
    found = find_sites(network)
    chosen = select(blocks, found.channels)
    sites = {}
    for id in chosen:
        attention: Any = found.attentions[id]
        check_plain(id, attention)
        heads = int(attention.heads)
        sites[id] = conversion.candidates(found.channels[id], heads, attention.to_q.out_features // heads)

    def sample(number: int) -> None:
        prompt = pictures.prompts[number % len(pictures.prompts)]
        with torch.no_grad():
            draw_picture(
                pipeline, prompt, steps=pictures.steps, seed=wishes.seed + number, **pictures.options()
            )

    @contextmanager
    def watching(see: SeeCall) -> Iterator[None]:
        def of_keys(
            id: str, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], mask: Tensor | None
        ) -> None:
            see(id, q, k, v, grid, None if mask is None else mask.reshape(len(q), -1))

        with watched(found, chosen, of_keys):
            yield

    return found, conversion.fit_and_choose(sites, watching, sample, wishes, on_picture=on_picture)
