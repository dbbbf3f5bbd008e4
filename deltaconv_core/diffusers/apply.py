"""`apply` and `remove`: ΔConv on a pipeline or model of diffusers, and off again without a trace."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..block.module import HALF_OR_MORE, shared_copy
from ..errors import DeltaConvError
from ..mixers.shared import shared_mixer
from ..sites import report
from ..sites.match import check_heads, matching_sites
from ..sites.report import Report
from ..sites.sampling_range import SamplingRange
from ..weights.checkpoint import DELTACONV_KIND, HYBRID_KIND, JOINT_KIND, load_checkpoint
from . import hooks
from .applied import NAME, Applied, AppliedBlocks, blocks_on
from .base_weights import BaseWeights, check_exchange, exchange
from .conflicts import ConflictWatch, conflicts
from .forwards import MixerForward, RangedForward
from .joint import JointMixerForward, JointModel, find_joint
from .projections import check_plain
from .sites import Sites, find_sites, network_of

TRAIN_TIMESTEPS = 1000

Hooked = tuple[nn.Module, Callable[..., Any]]

log = logging.getLogger(__name__)


def apply(
    pipeline_or_model: Any,
    ckpt: Any,
    blocks: str = "all",
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    base_weights_strength: float = 1.0,
) -> Report:
    """Puts ΔConv in place of self-attention, and in place of a ΔConv that is there already.

    The model itself is changed; `remove` restores it. The blocks follow its device and dtype, offloading
    included, but are neither among its parameters nor in its state dict. Attention processors, slicing and
    IP-Adapters may be set before or after; so may `torch.compile`, which with a range shorter than the whole
    breaks its graph once per call to read the timestep.

    Args:
        pipeline_or_model: a pipeline with `unet` or `transformer`, or that model itself.
        ckpt: trained blocks: a Checkpoint, or the path of a file or folder that `load_checkpoint` reads.
        blocks: where ΔConv stands, in the language of `deltaconv_core.sites.select`: "all", or a comma list
            of down, mid, up and site ids with wildcards; a leading "-" excludes.
        start_percent, end_percent: the part of the sampling in which it runs, attention outside; 0 is noise,
            1 the picture. As in ComfyUI these are fractions of the trained timesteps, not of the number of
            steps: p is timestep (1 - p) * (T - 1), T being the scheduler's `num_train_timesteps` (1000 for a
            bare model).
        base_weights_strength: some files hold convolutions of the model that they were trained on;
            1 puts them into the model, 0 leaves them out, a value between mixes.

    Returns:
        What was done, which is also logged, and warnings.

    Raises:
        DeltaConvError: what does not go together, by name; the model is as it was before.
    """
    model = network_of(pipeline_or_model)
    sampling = SamplingRange(start_percent, end_percent)
    source = os.fspath(ckpt) if isinstance(ckpt, (str, os.PathLike)) else None
    if joint := find_joint(model):
        checkpoint = ckpt if source is None else load_checkpoint(source)
        return _apply_joint(model, joint, checkpoint, blocks, sampling, source)
    found = find_sites(model)
    checkpoint = ckpt if source is None else load_checkpoint(source)
    chosen = matching_sites(found.architecture, found.channels, checkpoint, blocks)
    if checkpoint.mixer == HYBRID_KIND:
        check_heads(checkpoint, {site: int(found.attentions[site].heads) for site in chosen})  # type: ignore[arg-type]
        for site in chosen:
            check_plain(site, found.attentions[site])
    needed = _hooks(model, found, chosen, sampling, _train_timesteps(pipeline_or_model))
    before = blocks_on(model)
    weights, about_weights = _base_weights(model, checkpoint, before, base_weights_strength)
    sites = {site: found.attentions[site] for site in chosen}
    trained = {site: checkpoint.blocks[site] for site in chosen}
    about = Applied(
        found.architecture,
        checkpoint.mixer,
        {site: block.spec for site, block in trained.items()},
        start_percent,
        end_percent,
        tuple(weights),
        base_weights_strength if weights else 0.0,
        source,
        dict(checkpoint.metadata),
    )
    new = AppliedBlocks(_copies(model, trained), sites, about)
    lines = [report.of_blocks(found.architecture, len(found.channels), new.blocks.values())]
    lines += [*report.of_kept(checkpoint.kept), *report.of_range(sampling), *about_weights]
    if before is not None:
        _take_off(model, before)
        lines.append("The ΔConv that was on this model before is replaced as a whole.")
    keep = new.keeps_projections
    told = Report(lines, [*report.assumptions(checkpoint), *conflicts(model, sites, keep)])
    _put_on(model, new, [*needed, (model, ConflictWatch(sites, keep, told.warnings))], sampling)
    new.originals = exchange(model, weights)
    log.info("%s", " ".join(told.lines))
    for warning in told.warnings:
        log.warning("ΔConv: %s", warning)
    return told


def _apply_joint(
    model: nn.Module,
    found: JointModel,
    checkpoint: Any,
    blocks: str,
    sampling: SamplingRange,
    source: str | None,
) -> Report:
    """`apply` for a model whose attention is of text and image together."""
    if checkpoint.blocks and checkpoint.mixer != JOINT_KIND:
        raise DeltaConvError(
            f"the weights are of {checkpoint.mixer} blocks for {checkpoint.architecture}, but this model is "
            f"{found.architecture}, whose attention is of text and image together: choose joint mixers made "
            "for it"
        )
    if not sampling.is_everything:
        raise DeltaConvError(
            f"joint mixers run in all of the sampling in diffusers, got start_percent={sampling.start}, "
            f"end_percent={sampling.end}: leave both out"
        )
    chosen = matching_sites(found.architecture, found.channels, checkpoint, blocks)
    check_heads(checkpoint, {site: found.heads[site] for site in chosen})
    before = blocks_on(model)
    trained = {site: checkpoint.blocks[site] for site in chosen}
    specs = {site: block.spec for site, block in trained.items()}
    about = Applied(
        found.architecture, checkpoint.mixer, specs, 0.0, 1.0, (), 0.0, source, dict(checkpoint.metadata)
    )
    new = AppliedBlocks(_copies(model, trained), {site: found.attentions[site] for site in chosen}, about)
    lines = [report.of_blocks(found.architecture, len(found.channels), new.blocks.values())]
    lines += [*report.of_joint(checkpoint, chosen), *report.of_kept(checkpoint.kept)]
    if before is not None:
        _take_off(model, before)
        lines.append("The ΔConv that was on this model before is replaced as a whole.")
    for site, attention in new.attentions.items():
        forward = JointMixerForward(site, new, found, attention.forward)
        new.forwards[site] = attention.__dict__.get("forward")
        attention.__dict__["forward"] = forward
    new.handles.append(model.register_forward_pre_hook(found.tell, with_kwargs=True))
    model.add_module(NAME, new)
    told = Report(lines, report.assumptions(checkpoint))
    log.info("%s", " ".join(told.lines))
    return told


def remove(pipeline_or_model: Any) -> None:
    """Takes ΔConv off: every attention has its own `forward` again, every weight its own bits.

    A model without ΔConv stays as it is, which is said in the log.

    Raises:
        DeltaConvError: something was put on top of ΔConv in the meantime; nothing was changed.
    """
    model = network_of(pipeline_or_model)
    there = blocks_on(model)
    if there is None:
        log.warning("ΔConv: there is none on this model (%s), nothing to remove", type(model).__name__)
    else:
        _take_off(model, there)


def _base_weights(
    model: nn.Module, checkpoint: Any, before: AppliedBlocks | None, strength: float
) -> tuple[dict[str, Tensor], list[str]]:
    """The values for parameters of the model, and what to report about them."""
    if not 0.0 <= strength <= 1.0:
        raise DeltaConvError(f"expected 0 <= base_weights_strength <= 1, got {strength}")
    base_weights = checkpoint.base_weights
    if not base_weights:
        return {}, []
    try:
        base = BaseWeights(model, base_weights, {} if before is None else before.originals)
    except DeltaConvError as error:
        if strength > 0:
            raise
        return {}, [report.of_unfit_base_weights(len(base_weights), error)]
    if strength == 0:
        return {}, [report.of_base_weights(len(base_weights), base.difference, None)]
    check_exchange(model, base_weights)
    return base.mixed(strength), [report.of_base_weights(len(base_weights), base.difference, strength)]


def _copies(model: nn.Module, trained: Mapping[str, Any]) -> dict[str, Any]:
    """The blocks on the device and, where it is an ordinary one, in the dtype of the model."""
    weight = next(model.parameters())
    device = torch.device("cpu") if weight.is_meta else weight.device
    dtype = getattr(model, "dtype", weight.dtype)
    known = dtype if dtype in HALF_OR_MORE else None
    return {
        site: shared_copy(block, device, known)
        if block.kind == DELTACONV_KIND
        else shared_mixer(block, device)
        for site, block in trained.items()
    }


def _hooks(
    model: nn.Module, found: Sites, chosen: Collection[str], sampling: SamplingRange, train_timesteps: int
) -> list[Hooked]:
    """What has to be hooked so that the chosen sites are told what they need, and nobody else is."""
    needed: list[Hooked] = []
    replaced = [found.attentions[site] for site in chosen]
    for stack in found.stacks:
        telling = hooks.grid_hooks(stack, replaced)
        needed += telling
        if not telling and not sampling.is_everything:
            needed.append((stack.module, hooks.KeepBack.of(stack.module)))
    if not sampling.is_everything:
        needed.append((model, hooks.TellChoice.of(model, sampling, train_timesteps)))
    return needed


def _put_on(model: nn.Module, new: AppliedBlocks, needed: Iterable[Hooked], sampling: SamplingRange) -> None:
    for site, attention in new.attentions.items():
        if sampling.is_everything:
            forward = MixerForward(site, new)
        else:
            forward = RangedForward(site, new, attention.forward)
        new.forwards[site] = attention.__dict__.get("forward")
        attention.__dict__["forward"] = forward
    for module, hook in needed:
        new.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    model.add_module(NAME, new)


def _take_off(model: nn.Module, there: AppliedBlocks) -> None:
    for site, attention in there.attentions.items():
        forward = attention.__dict__.get("forward")
        if getattr(forward, "blocks", None) is not there:
            raise DeltaConvError(
                f"something else ({forward!r:.80}) was put on top of ΔConv at {site}; take that off first"
            )
    check_exchange(model, there.originals)
    for site, attention in there.attentions.items():
        del attention.__dict__["forward"]
        if there.forwards[site] is not None:
            attention.__dict__["forward"] = there.forwards[site]
    for handle in there.handles:
        handle.remove()
    exchange(model, there.originals)
    del model._modules[NAME]


def _train_timesteps(pipeline_or_model: Any) -> int:
    config = getattr(getattr(pipeline_or_model, "scheduler", None), "config", {})
    return int(config.get("num_train_timesteps", TRAIN_TIMESTEPS))
