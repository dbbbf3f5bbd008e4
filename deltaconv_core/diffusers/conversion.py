"""Hybrid or joint mixers for a diffusers pipeline, fitted while it draws pictures, and timed here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..distill import conversion
from ..distill.conversion import Conversion, Wishes
from ..distill.hybrid import HybridFit, SeeCall
from ..distill.joint_fit import JointFit
from ..errors import DeltaConvError
from ..sites import select
from .applied import blocks_on
from .draw import draw_picture
from .joint import JointModel, find_joint, watched_joint
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

    Raises:
        DeltaConvError: no prompts, or a text in place of a list of them.
    """

    prompts: Sequence[str] = ("a photograph",)
    negative: str = ""
    width: int | None = None
    height: int | None = None
    steps: int = 4

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str) or not self.prompts:
            raise DeltaConvError(f"expected a list of prompts, at least one, got {self.prompts!r}")

    def half(self, multiple: int) -> Pictures:
        """Of half the width and height, in multiples of so many pixels."""
        if self.width is None or self.height is None:
            raise DeltaConvError(
                "expected a width and height of the pictures for a model of text and image together, got "
                f"{self.width} x {self.height}; name the size to be fast at"
            )
        width, height = (
            max(multiple, side // 2 // multiple * multiple) for side in (self.width, self.height)
        )
        return replace(self, width=width, height=height)

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
) -> tuple[Sites | JointModel, Conversion]:
    """Fits mixers to a pipeline's self-attention and chooses among them; the pipeline stays as it is.

    Models whose attention is of text and image together also draw pictures of half the width and height,
    so that their joint mixers fit the sizes between.

    Args:
        pipeline: a diffusers pipeline with a U-Net, PixArt or one of `joint.JOINT_FAMILIES`, guided as its
            own default is.
        pictures: what is drawn; with a width and height for models of the latter.
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
    joint = find_joint(network)
    found = joint or find_sites(network)
    chosen = select(blocks, found.channels)
    sizes = [pictures] if joint is None else [pictures, pictures.half(_multiple(pipeline))]

    def sample(number: int) -> None:
        prompt = pictures.prompts[number % len(pictures.prompts)]
        options = conversion.in_turn(sizes, number).options()
        with torch.no_grad():
            draw_picture(pipeline, prompt, steps=pictures.steps, seed=wishes.seed + number, **options)

    @contextmanager
    def watching(see: SeeCall) -> Iterator[None]:
        def of_keys(
            id: str, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], mask: Tensor | None
        ) -> None:
            see(id, q, k, v, grid, None if mask is None else mask.reshape(len(q), -1))

        if isinstance(found, Sites):
            watch = watched(found, chosen, of_keys)
        else:
            watch = watched_joint(network, found, chosen, see)
        with watch:
            yield

    sites: dict[str, Any] = {}
    for id in chosen:
        attention: Any = found.attentions[id]
        channels = found.channels[id]
        heads = int(attention.heads)
        if joint is None:
            check_plain(id, attention)
            sites[id] = conversion.candidates(channels, heads, attention.to_q.out_features // heads)
        else:
            sites[id] = conversion.joint_candidates(channels, heads, channels // heads)
    return found, conversion.fit_and_choose(
        sites,
        watching,
        sample,
        wishes,
        on_picture=on_picture,
        fitting=HybridFit if joint is None else JointFit,
    )


def _multiple(pipeline: Any) -> int:
    """Pixels of which the sides of pictures are multiples: of 2 x 2 patches of the latent."""
    return 2 * int(getattr(pipeline, "vae_scale_factor", 8))
