"""Hybrid or joint mixers for a MODEL, fitted while it samples, timed here, and put on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ....deltaconv_core.bench import LATENT
from ....deltaconv_core.distill import conversion, conversion_report
from ....deltaconv_core.distill.conversion import Conversion, Wishes
from ....deltaconv_core.distill.hybrid import HybridFit, SeeCall
from ....deltaconv_core.distill.joint_fit import JointFit
from ....deltaconv_core.errors import DeltaConvError
from ....deltaconv_core.sites import select
from ....deltaconv_core.sites.sampling_range import SamplingRange
from ....deltaconv_core.weights.checkpoint import Checkpoint
from ..model.attend import OVERRIDE, heads_of
from ..model.joint import JointSite, JointSites, Tokens, find_joint_sites
from ..model.sites import Site, Sites, find_sites, network_of
from ..model.standing import check_reach
from ..patch.apply import PatchSettings, apply_checkpoint
from ..patch.joint_mixers import apply_joint, layout_of
from ..report import Report, show
from ..watch import fitting, plain, sample, watch_joint, watch_sites

GUIDANCE = 4.0
CONVERT_REMEDY = "convert the MODEL without that node"


@dataclass(frozen=True)
class ConversionJob:
    """What the user chose.

    Args:
        wishes: budget, pictures, seed.
        steps: of each picture.
        blocks: the sites, in the language of `deltaconv_core.sites.select`.
    """

    wishes: Wishes
    steps: int
    blocks: str


@dataclass(frozen=True)
class Converted:
    """The result.

    Args:
        model: with the mixers on it; as it came in where all attention stays.
        checkpoint: the mixers.
        report: in words.
        table: a line for each self-attention.
    """

    model: ModelPatcher
    checkpoint: Checkpoint
    report: Report
    table: str


def convert(
    model: ModelPatcher, positive: Any, negative: Any, latent: dict[str, Any], job: ConversionJob, hidden: Any
) -> Converted:
    """Converts a MODEL, which stays as it is, also when the user stops it.

    Args:
        model: ModelPatcher; ΔConv that may be on it is replaced.
        positive: conditioning.
        negative: likewise; None: pictures are sampled without guidance.
        latent: its size is that of the pictures; models of text and image together also draw some of half
            its sides.
        job: what the user chose.
        hidden: the node's hidden inputs, for the text under it.

    Raises:
        DeltaConvError: a MODEL whose attention cannot be replaced, or wishes that cannot be.
    """
    clone = plain(model)
    found = find_joint_sites(network_of(clone)) or find_sites(clone)
    chosen = select(job.blocks, found.channels)
    places = found.sites if isinstance(found, JointSites) else [found.sites[id] for id in chosen]
    check_reach(clone, (place.path for place in places), CONVERT_REMEDY)
    samples = fitting(clone, latent)[:1]
    sizes = _sizes(samples) if isinstance(found, JointSites) else [samples]
    done = _fit(clone, found, chosen, (positive, negative), sizes, job, hidden)
    latents = " and ".join(f"{one.shape[-1]}x{one.shape[-2]}" for one in sizes)
    metadata = {
        "teacher": type(model.model).__name__,
        "source": "converted with ComfyUI-DeltaConv",
        "pictures": f"{job.wishes.pictures} of {latents} latents, {job.steps} steps",
    }
    checkpoint = done.checkpoint(found.architecture, found.channels, metadata)
    pixels = getattr(model.model.latent_format, "spacial_downscale_ratio", LATENT)
    size = (samples.shape[-1] * pixels, samples.shape[-2] * pixels)
    lines, warnings = conversion_report.summary_lines(done, size, job.steps), []
    if checkpoint.blocks and isinstance(found, JointSites):
        model, patched = apply_joint(
            model, found, checkpoint, "all", SamplingRange(), partial(show, hidden=hidden)
        )
        warnings = list(patched.warnings)
    elif checkpoint.blocks and isinstance(found, Sites):
        settings = PatchSettings("all", SamplingRange(), None)
        model, patched = apply_checkpoint(model, found, checkpoint, settings)
        warnings = list(patched.warnings)
    return Converted(
        model, checkpoint, Report(lines, warnings), conversion_report.report_text(done, size, job.steps)
    )


def _sizes(samples: torch.Tensor) -> list[torch.Tensor]:
    """Latents of the size that is wished for and of half its sides, in whole patches; joint mixers are fitted
    to both, so that they also fit the sizes between."""
    height, width = (max(2, side // 4 * 2) for side in samples.shape[-2:])
    return [samples, samples[..., :height, :width]]


def _fit(
    clone: ModelPatcher,
    found: Sites | JointSites,
    chosen: tuple[str, ...],
    conditions: tuple[Any, Any],
    sizes: list[torch.Tensor],
    job: ConversionJob,
    hidden: Any,
) -> Conversion:
    positive, negative = conditions
    given = {"positive": positive} | ({} if negative is None else {"negative": negative})
    pictures, steps = job.wishes.pictures, job.steps
    bar = comfy.utils.ProgressBar(pictures * steps)

    def draw(number: int) -> None:
        show(f"picture {number + 1} of {pictures}", hidden)

        def turn_to(step: int) -> None:
            bar.update_absolute(number * steps + step, pictures * steps)

        guidance = 1.0 if negative is None else GUIDANCE
        samples = conversion.in_turn(sizes, number)
        sample(clone, given, samples, steps, job.wishes.seed + number, turn_to, guidance)

    @contextmanager
    def watched(see: SeeCall) -> Iterator[None]:
        def of_keys(id: str, q: Any, k: Any, v: Any, grid: tuple[int, int], mask: Any) -> None:
            see(id, q, k, v, grid, _of_keys(id, mask, q))

        def of_image(site: JointSite, tokens: Tokens, qkvm: Any, args: Any, call: Any) -> None:
            q, k, v, mask = qkvm
            layout = layout_of(site, tokens, (q, k, mask), args, call)
            if not isinstance(layout, str):
                see(site.id_of(q.shape[2], tokens), q, k, v, layout, mask)

        if isinstance(found, JointSites):
            watch_joint(clone, found, of_image)
        else:
            watch_sites(clone, [found.sites[id] for id in chosen], of_keys)
        try:
            yield
        finally:
            clone.unpatch_model(unpatch_weights=False)

    def drawn(count: int) -> None:
        if count == pictures:
            show("timing attention and mixers", hidden)

    kind: type[HybridFit] = HybridFit
    sites: dict[str, Any]
    if isinstance(found, JointSites):
        kind, heads = JointFit, found.heads
        shapes = {id: (found.channels[id], heads[id], found.channels[id] // heads[id]) for id in chosen}
        sites = {id: conversion.joint_candidates(*shape) for id, shape in shapes.items()}
    else:
        sites = {id: conversion.candidates(*_shape(clone, found.sites[id])) for id in chosen}
    check = comfy.model_management.throw_exception_if_processing_interrupted
    return conversion.fit_and_choose(
        sites, watched, draw, job.wishes, _attention_of(clone), check, drawn, fitting=kind
    )


def _shape(clone: ModelPatcher, site: Site) -> tuple[int, int, int]:
    """Channels of the tokens, heads, and channels of a head."""
    heads = heads_of(clone, site)
    width = getattr(clone.get_model_object(site.path), "dim_head", site.channels // heads)
    return site.channels, heads, width


def _of_keys(id: str, mask: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    """A mask (B or 1, 1, 1, N) as one of the keys (B, N)."""
    if mask is None:
        return None
    if mask.shape[1:3] != (1, 1):
        raise DeltaConvError(
            f"something masks the self-attention at {id} for some queries only, which mixers cannot do: "
            "leave this site out with the input `blocks`"
        )
    return mask[:, 0, 0].expand(len(q), -1)


def _attention_of(clone: ModelPatcher) -> conversion.Attending:
    """ComfyUI's attention as the MODEL's layers call it, with what other nodes put in its place."""
    options = {OVERRIDE: clone.model_options["transformer_options"].get(OVERRIDE)}
    given = {"transformer_options": options} if options[OVERRIDE] else {}

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        chosen = comfy.ldm.modules.attention.optimized_attention
        return chosen(q, k, v, q.shape[1], skip_reshape=True, **given)

    return attend
