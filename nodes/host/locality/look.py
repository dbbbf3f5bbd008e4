"""Looking at a MODEL's self-attention while it samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ....deltaconv_core.errors import DeltaConvError
from ....deltaconv_core.locality import LayerLocality, LayerStatistics
from ....deltaconv_core.locality.sampled_steps import spread
from ....deltaconv_core.sites import select
from ..model.joint import JointSite, JointSites, Tokens, find_joint_sites
from ..model.sites import find_sites, network_of
from ..model.standing import check_reach
from ..watch import fitting, plain, sample, watch_joint, watch_sites


@dataclass(frozen=True)
class LookSettings:
    """What the user chose.

    Args:
        steps: of the sampling.
        looks: at how many of them the attention is looked at.
        blocks: the sites, in the language of `deltaconv_core.sites.select`.
        seed: of the noise.
    """

    steps: int
    looks: int
    blocks: str
    seed: int


@dataclass(frozen=True)
class Look:
    """What was seen.

    Args:
        architecture: name of the model's shape or family.
        layers: in the order of the network.
        size: (height, width) of the latent that was sampled.
        unseen: sites whose attention was never called.
        replaceable: whether ΔConv can stand in for these attentions.
    """

    architecture: str
    layers: list[LayerLocality]
    size: tuple[int, int]
    unseen: list[str]
    replaceable: bool


def look(model: ModelPatcher, positive: Any, latent: dict[str, Any], settings: LookSettings) -> Look:
    """Samples with the positive conditioning alone and gathers statistics of the self-attention on the way.

    Args:
        model: ModelPatcher, which stays as it is. Whatever replaces its self-attention is left out.
        positive: conditioning.
        latent: its size is that of the picture; an empty one is made to fit the model, as a sampler does.
        settings: what the user chose.

    Raises:
        DeltaConvError: a MODEL whose attention cannot be looked at, or a selection that names no site.
    """
    clone = plain(model)
    found = find_joint_sites(network_of(clone)) or find_sites(clone)
    chosen = select(settings.blocks, found.channels)
    samples = fitting(clone, latent)
    places = found.sites if isinstance(found, JointSites) else [found.sites[id] for id in chosen]
    check_reach(clone, [place.path for place in places], "look at the MODEL without that node")
    at = spread(settings.steps, settings.looks)
    watch = LocalityWatch.of(
        {id: found.channels[id] for id in chosen}, total=settings.steps + len(at) * len(chosen)
    )
    if isinstance(found, JointSites):
        watch_joint(clone, found, watch.see_joint, lambda: watch.moment is not None)
    else:
        sites = [found.sites[id] for id in chosen]
        watch_sites(clone, sites, watch.see_site, lambda: watch.moment is not None)
    try:
        sample(
            clone,
            {"positive": positive},
            samples,
            settings.steps,
            settings.seed,
            lambda step: watch.turn_to(step, at, settings.steps),
        )
    finally:
        clone.unpatch_model(unpatch_weights=False)
    size = (samples.shape[-2], samples.shape[-1])
    return _result(watch, found.architecture, size, not isinstance(found, JointSites))


@dataclass
class LocalityWatch:
    """The statistics that are being gathered, and what the running call is."""

    statistics: dict[str, LayerStatistics]
    bar: comfy.utils.ProgressBar
    moment: str | None = None

    @classmethod
    def of(cls, channels: dict[str, int], total: int) -> LocalityWatch:
        check = comfy.model_management.throw_exception_if_processing_interrupted
        statistics = {id: LayerStatistics(id, width, check=check) for id, width in channels.items()}
        return cls(statistics, comfy.utils.ProgressBar(total))

    def turn_to(self, step: int, at: list[int], steps: int) -> None:
        """The step that comes next."""
        self.moment = f"{step + 1}/{steps}" if step in at else None
        if step:
            self.bar.update(1)

    def see_site(
        self,
        id: str,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        grid: tuple[int, int],
        mask: torch.Tensor | None,
    ) -> None:
        """A call of an attention among the tokens of the picture alone."""
        self.see(id, q, k, grid, slice(0, q.shape[2]), mask)

    def see_joint(
        self,
        site: JointSite,
        tokens: Tokens,
        qkvm: tuple[Any, ...],
        args: tuple[Any, ...],
        call: dict[str, Any],
    ) -> None:
        """A call of an attention among tokens of other kinds too."""
        q, k, _, mask = qkvm
        image = site.locate(args, call, q.shape[2], tokens)
        if image is not None:
            self.see(site.id_of(q.shape[2], tokens), q, k, tokens.grid, image, mask)

    def see(
        self,
        id: str,
        q: torch.Tensor,
        k: torch.Tensor,
        grid: tuple[int, int],
        image: slice,
        mask: torch.Tensor | None,
    ) -> None:
        """One attention of the running call."""
        if id in self.statistics:
            self.statistics[id].add(q, k, grid, self.moment or "", image, mask)
            self.bar.update(1)


def _result(watch: LocalityWatch, architecture: str, size: tuple[int, int], replaceable: bool) -> Look:
    layers = [statistics.result() for statistics in watch.statistics.values() if statistics.seen]
    unseen = [id for id, statistics in watch.statistics.items() if not statistics.seen]
    if not layers:
        raise DeltaConvError(
            f"none of the {len(unseen)} self-attentions was called in the usual way; something on this MODEL "
            "replaces them (attn1 replace patches, skipped blocks): look at the MODEL without it"
        )
    return Look(architecture, layers, size, unseen, replaceable)
