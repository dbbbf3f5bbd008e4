"""What self-attention costs in a MODEL on this machine, and what ΔConv costs in its place."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ....deltaconv_core.bench import LATENT, Layer, LayerCost, layer_cost
from ....deltaconv_core.bench.layers import ATTENTION, DELTACONV
from ....deltaconv_core.block import DeltaConvBlock
from ....deltaconv_core.errors import DeltaConvError
from ....deltaconv_core.sites import part_of
from ....deltaconv_core.sites.choose_specs import AUTO, LEAN, block_specs
from ....deltaconv_core.sites.match import matching_sites
from ....deltaconv_core.sites.sampling_range import SamplingRange
from ....deltaconv_core.weights.checkpoint import Checkpoint, check_deltaconv
from ..model.sites import Sites, find_sites, uncompiled
from ..patch.applied import blocks_on, with_blocks, without_blocks
from .passes import Clock, Given, one_pass, random_input, without_attention

NOTHING = "nothing"
MOST_ON_CPU = 2**16
"""Positions of a latent over which attention is still measured on a CPU."""


@dataclass(frozen=True)
class MeasureSettings:
    """What the user chose.

    Args:
        width, height: of the picture in pixels.
        batch: samples in a pass.
        repeats: timed passes of each kind.
        form: of untrained blocks, "lean" or "released".
    """

    width: int
    height: int
    batch: int
    repeats: int
    form: str = LEAN


@dataclass(frozen=True)
class Measured:
    """What was found.

    Args:
        architecture: of the model.
        costs: of the self-attentions, by part.
        passes: seconds of one pass of the network with attention, with ΔConv, and with nothing in its place.
        blocks: what stood in for attention.
        unseen: sites that were never called.
    """

    architecture: str
    costs: list[LayerCost]
    passes: dict[str, float]
    blocks: str
    unseen: list[str]


def measure(model: ModelPatcher, checkpoint: Checkpoint | None, settings: MeasureSettings) -> Measured:
    """Passes of the network with random input, by turns; the first of each kind is not counted.

    Args:
        model: ModelPatcher, which stays as it is.
        checkpoint: trained blocks, or None: those on the MODEL, or else untrained ones.
        settings: what the user chose.

    Raises:
        DeltaConvError: a MODEL without sites, a checkpoint of another model, or a size that does not fit.
    """
    bare = uncompiled(without_blocks(model))
    found = find_sites(bare)
    size = _latent_size(model, settings)
    blocks, origin = _blocks(model, found, checkpoint, settings.form)
    sites = {id: found.sites[id] for id in blocks}
    patched, _ = with_blocks(bare, sites, blocks, SamplingRange())
    clocks = {ATTENTION: Clock(), DELTACONV: Clock()}
    models = {
        ATTENTION: clocks[ATTENTION].put_on(bare, sites.values()),
        DELTACONV: clocks[DELTACONV].put_on(patched, sites.values()),
        NOTHING: without_attention(bare, sites.values()),
    }
    try:
        passes = _alternate(models, random_input(bare, settings.batch, size), settings)
    finally:
        bare.unpatch_model(unpatch_weights=False)
    seen = [id for id in sites if all(id in clock.spans for clock in clocks.values())]
    if not seen:
        raise DeltaConvError(
            f"none of the {len(sites)} self-attentions was called in the usual way; something on this MODEL "
            "replaces them (attn1 replace patches, skipped blocks): measure the MODEL without it"
        )
    seconds = {name: _medians(clock) for name, clock in clocks.items()}
    layers = {id: _layer(id, blocks[id], clocks[DELTACONV].grids[id]) for id in seen}
    unseen = [id for id in sites if id not in seen]
    return Measured(found.architecture, _costs(layers, seconds, settings.batch), passes, origin, unseen)


def _latent_size(model: ModelPatcher, settings: MeasureSettings) -> tuple[int, int]:
    ratio = getattr(model.model.latent_format, "spacial_downscale_ratio", LATENT)
    height, width = settings.height // ratio, settings.width // ratio
    if model.load_device.type == "cpu" and height * width > MOST_ON_CPU:
        raise DeltaConvError(
            f"{settings.width} x {settings.height} pixels are {width} x {height} positions in this model's "
            f"latent; attention over more than {MOST_ON_CPU} takes hours on a CPU: choose a smaller picture"
        )
    return height, width


def _blocks(
    model: ModelPatcher, found: Sites, checkpoint: Checkpoint | None, form: str
) -> tuple[dict[str, Any], str]:
    """Site id -> block, and where they come from."""
    if checkpoint is not None:
        check_deltaconv(checkpoint, "ΔConv Benchmark")
        both = [id for id in found.sites if id in checkpoint.blocks]
        selection = ",".join(both) or "all"
        chosen = matching_sites(found.architecture, found.channels, checkpoint, selection, "MODEL")
        return {id: checkpoint.blocks[id] for id in chosen}, "the connected weights"
    if (patch := blocks_on(model)) and patch.keeps_projections:
        raise DeltaConvError(
            "ΔConv Benchmark works on ΔConvBlocks; this MODEL carries hybrid mixers: measure it without them"
        )
    if patch:
        return dict(zip(patch.sites, patch.blocks, strict=True)), "the blocks on this MODEL"
    with torch.inference_mode(False):
        specs = block_specs(found.shape, found.sites, AUTO, form)
        blocks = {id: DeltaConvBlock(spec) for id, spec in specs.items()}
    return blocks, f"untrained {form} blocks, which take the same time as trained ones"


def _alternate(models: Mapping[str, Any], given: Given, settings: MeasureSettings) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in models}
    bar = comfy.utils.ProgressBar(len(models) * (settings.repeats + 1))
    for turn in range(settings.repeats + 1):
        for name, one in models.items():
            comfy.model_management.throw_exception_if_processing_interrupted()
            try:
                span = one_pass(one, given)
            except comfy.model_management.OOM_EXCEPTION as error:
                raise DeltaConvError(
                    f"out of memory in a pass with {name} at {settings.width} x {settings.height}, batch "
                    f"{settings.batch}: measure a smaller picture or batch"
                ) from error
            if turn:
                taken[name].append(span.seconds)
            bar.update(1)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def _medians(clock: Clock) -> dict[str, float]:
    """The first call at each site is not counted."""
    return {id: statistics.median(s.seconds for s in spans[1:]) for id, spans in clock.spans.items()}


def _layer(id: str, block: Any, grid: tuple[int, int]) -> Layer:
    return Layer(part_of(id), block.spec, 1, grid)


def _costs(
    layers: Mapping[str, Layer], seconds: Mapping[str, Mapping[str, float]], batch: int
) -> list[LayerCost]:
    """Equal layers of a part together."""
    alike: dict[Layer, list[str]] = defaultdict(list)
    for id, layer in layers.items():
        alike[layer].append(id)
    return [
        layer_cost(
            replace(layer, sites=len(ids)),
            batch,
            sum(seconds[ATTENTION][id] for id in ids),
            sum(seconds[DELTACONV][id] for id in ids),
        )
        for layer, ids in alike.items()
    ]
