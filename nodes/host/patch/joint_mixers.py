"""Joint mixers on a clone of a MODEL: in place of the attention of text and image together.

They stand in ComfyUI's `optimized_attention_override`, inside the forward of each block: so whatever a block
does around its attention stays as it is (LoRA, ControlNet, rotary embeddings, patches of other packs), and
an override that another pack brought still answers whatever a mixer does not. Where a mixer cannot answer a
call, or is not worth it, the attention runs as usual, and the log says once why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ....deltaconv_core.errors import DeltaConvError
from ....deltaconv_core.mixers.joint import JointLayout
from ....deltaconv_core.mixers.joint.place import refusal_of_mask
from ....deltaconv_core.mixers.joint.plan import Plan
from ....deltaconv_core.sites import report
from ....deltaconv_core.sites.match import check_heads, matching_sites
from ....deltaconv_core.sites.report import Report
from ....deltaconv_core.sites.sampling_range import SamplingRange
from ....deltaconv_core.util.text import listing
from ....deltaconv_core.weights.checkpoint import DELTACONV_KIND, JOINT_KIND, Checkpoint
from ..model.attend import Usual, with_usual
from ..model.joint import JointSite, JointSites, Tokens
from ..model.standing import check_reach, own_forward
from . import site_patch
from .applied import KEY, AppliedBlocks, blocks_on, without_blocks
from .blocks import SiteMixers, build_blocks, network_dtype, own_patcher
from .conflicts import name_of, warn_once
from .current_call import Call, current_call
from .forwards import MixerForward
from .image_alone import standing_in
from .site_patch import REMEDY, forward_key

APPENDS_KEYS = "KV_Attn_Input"
"""Class of the attn1 patch of ComfyUI's Flux KV Cache, which appends the keys of reference pictures."""

log = logging.getLogger(__name__)


@dataclass
class Told:
    """What runs where, as it was found while sampling, and what was said of it.

    Args:
        plan: which of the two is faster.
        show: shows a text under the node.
        sizes: (H, W) of an image's tokens -> what runs at a site, and why -> its sites.
        said: sentences that were logged.
    """

    plan: Plan
    show: Callable[[str], None]
    sizes: dict[tuple[int, int], dict[tuple[bool, str], list[str]]] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)

    def note(self, grid: tuple[int, int], id: str, mixer: bool, reason: str) -> None:
        """What runs at a site for an image of this grid."""
        seen = self.sizes.setdefault(grid, {})
        if not any(id in ids for ids in seen.values()):
            seen.setdefault((mixer, reason), []).append(id)

    def lines(self) -> list[str]:
        """A sentence for each size, and for each thing that runs there."""
        return [
            f"Images of {grid[0]} x {grid[1]} tokens: {'mixers run' if mixer else 'attention stays'} in "
            f"{len(ids)} attentions ({listing(ids)}): {reason}."
            for grid, seen in self.sizes.items()
            for (mixer, reason), ids in seen.items()
        ]


@dataclass(frozen=True, eq=False)
class Met:
    """One call of an attention: what it was given, by head, and how it would be answered as usual."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    usual: Usual


@dataclass(frozen=True, eq=False)
class JointForward(MixerForward):
    """Joint mixers in the attentions of one block.

    Args:
        told: what is found out while they run.
    """

    told: Told | None = None

    def __call__(self, *args: Any, **call: Any) -> Any:
        run = current_call(self.owner, "sample it with a sampler, or take ΔConv off this MODEL")
        behind = run.behind[self.site.path]
        if run.choice is False:
            return behind(*args, **call)
        held: Any = self.block
        if held.kind == DELTACONV_KIND and run.tokens is not None:
            module: Any = run.own[self.site.path].__self__  # type: ignore[attr-defined]
            (block,) = held.mixers
            with standing_in(module.x_block.attn2, block, run.tokens.grid, run.choice):
                return behind(*args, **call)

        def attend(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, usual: Usual
        ) -> torch.Tensor | None:
            met = Met(q, k, v, mask, usual)
            mixed = self._answer(run, met, args, call)
            if mixed is None or run.choice is True:
                return mixed
            choice = torch.as_tensor(run.choice, device=q.device).view(-1, 1, 1, 1)
            return torch.where(choice, mixed, usual(q, k, v, mask))

        return with_usual(behind, attend)(*args, **call)

    def _answer(
        self, run: Call, met: Met, args: tuple[Any, ...], call: dict[str, Any]
    ) -> torch.Tensor | None:
        """A mixer's answer; None: attention as usual."""
        site: Any = self.site
        mixers: Any = self.block
        tokens, told = run.tokens, self.told
        if tokens is None or told is None:
            return None
        id = site.id_of(met.q.shape[2], tokens)
        mixer = mixers.of(id)
        if mixer is None:
            site.locate(args, call, met.q.shape[2], tokens)  # blocks after it may have to know
            return None
        layout = layout_of(site, tokens, (met.q, met.k, met.mask), args, call)
        if isinstance(layout, str):
            told.note(tokens.grid, id, False, layout)
            warn_once(f"attention stays where joint mixers could be, since {layout}", told.said)
            return None
        given = (met.q, met.k, met.v, layout, met.mask, met.usual)
        verdict = told.plan.verdict(mixer, *given)
        told.note(tokens.grid, id, verdict.mixer, verdict.reason)
        return mixer(*given) if verdict.mixer else None


def layout_of(
    site: JointSite,
    tokens: Tokens,
    qkm: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    args: tuple[Any, ...],
    call: dict[str, Any],
) -> JointLayout | str:
    """Where the image is in a call of an attention; or why no mixer can answer the call.

    Args:
        site: of the block that calls it.
        tokens: what is known of the tokens of the running call of the network.
        qkm: the attention's queries, keys and mask, by head.
        args, call: of the block.
    """
    (q, k, mask) = qkm
    queries, keys = q.shape[2], k.shape[2]
    place = site.locate(args, call, queries, tokens)
    if place is None:
        return "the host has not said how many tokens of text come before the image"
    if tokens.frames > 1:
        return f"there are {tokens.frames} images one after the other (layers, or frames)"
    if place.start < 0 or place.stop > queries:
        return (
            f"the image of {tokens.grid[0]} x {tokens.grid[1]} tokens after {place.start} others does not "
            f"fit into {queries} queries: something merges, tiles or drops tokens"
        )
    if keys < queries:
        return f"there are fewer keys ({keys}) than queries ({queries})"
    patches = (call.get("transformer_options") or {}).get("patches", {}).get("attn1_patch", [])
    others = {name_of(patch) for patch in patches} - {APPENDS_KEYS}
    if keys > queries and others:
        return f"{', '.join(sorted(others))} (attn1 patch) adds keys, and may put them before the image"
    layout = JointLayout(tokens.grid, place.start)
    return refusal_of_mask(mask, layout) or layout


class JointPatch(AppliedBlocks):
    """What joint mixers are on a MODEL; see `AppliedBlocks`."""

    found: JointSites
    checkpoint: Checkpoint
    """What the mixers were taken from."""
    chosen: tuple[str, ...]
    """Ids of the attentions with a mixer."""

    def _call(self, base: BaseModel, x: torch.Tensor, sigmas: torch.Tensor) -> Call:
        choice: Any = True
        if not self.sampling.is_everything:
            choice = self.sampling.choose(sigmas, base.model_sampling.percent_to_sigma)
        behind = {site.path: self._behind(base, site) for site in self.sites.values()}
        own = {site.path: own_forward(base, site.path) for site in self.sites.values()}
        return Call(choice, own, behind, tokens=self.found.tokens(x))


def apply_joint(
    model: ModelPatcher,
    found: JointSites,
    checkpoint: Checkpoint,
    blocks: str,
    sampling: SamplingRange,
    show: Callable[[str], None] = lambda text: None,
    plan: Plan | None = None,
) -> tuple[ModelPatcher, Report]:
    """Puts joint mixers on a clone of the MODEL, in place of ΔConv that may be there already.

    Args:
        model: ModelPatcher.
        found: its joint attentions.
        checkpoint: joint mixers (`deltaconv_core.Checkpoint`), or ΔConvBlocks for the second attentions of SD
            3.5, which are of the image alone.
        blocks: the attentions, in the language of `deltaconv_core.sites.select`.
        sampling: the part of the sampling in which they run.
        show: shows a text under the node while the MODEL samples.
        plan: which of mixer and attention runs; None: whichever is faster.

    Raises:
        DeltaConvError: the MODEL, the checkpoint and the settings do not go together; nothing was changed.
    """
    joint, alone = checkpoint.mixer == JOINT_KIND, found.of_image_alone
    known = joint or (checkpoint.mixer, checkpoint.architecture) == (DELTACONV_KIND, alone and "sd3")
    if checkpoint.blocks and not known:
        raise DeltaConvError(
            f"the weights are of {checkpoint.mixer} blocks for {checkpoint.architecture}, which replace "
            f"attention among the tokens of an image alone, but this MODEL is {found.architecture}, whose "
            "attention is of text and image together: choose joint mixers made for it"
        )
    channels = found.channels if joint else {id: found.channels[id] for id in alone}
    chosen = matching_sites(found.architecture, channels, checkpoint, blocks, "MODEL")
    if joint:
        check_heads(checkpoint, {id: found.heads[id] for id in chosen}, "MODEL")
    bare = without_blocks(model)
    sites = {site.id: site for site in _needed(found, chosen)}
    check_reach(bare, (site.path for site in sites.values()), REMEDY)
    clone = bare.clone()
    dtype = None if joint else network_dtype(bare)
    mixers = build_blocks({id: checkpoint.blocks[id] for id in chosen}, dtype)
    held = {
        key: SiteMixers({id: mixers[id] for id in site.ids if id in chosen}) for key, site in sites.items()
    }
    keys = {key: forward_key(site) for key, site in sites.items()}  # type: ignore[arg-type]
    covered = {key: clone.object_patches[key] for key in keys.values() if key in clone.object_patches}
    patch = JointPatch(own_patcher(held, bare), sites, sampling, covered)  # type: ignore[arg-type]
    patch.found, patch.checkpoint, patch.chosen = found, checkpoint, tuple(chosen)
    told = Told(plan or Plan(), show)
    for key, site in sites.items():
        clone.add_object_patch(keys[key], JointForward(site, held[key], patch.owner, told))  # type: ignore[arg-type]
    site_patch.put_on(clone, patch)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _tell_after_sampling(sites, told))
    warnings = report.assumptions(checkpoint)
    lines = [report.of_blocks(found.architecture, len(found.channels), mixers.values())]
    lines += report.of_joint(checkpoint, chosen) if joint else []
    lines += [*report.of_kept(checkpoint.kept), *report.of_range(sampling)]
    if blocks_on(model) is not None:
        lines.append("The ΔConv that was on this MODEL before is replaced as a whole.")
    return clone, Report(lines, warnings)


def _needed(found: JointSites, chosen: Iterable[str]) -> list[JointSite]:
    """The blocks with chosen attentions; if none of them says how much text there is, also one that does."""
    needed = [site for site in found.sites if not set(site.ids).isdisjoint(chosen)]
    stating = [site for site in found.sites if site.states_text]
    return needed if any(site.states_text for site in needed) else stating[:1] + needed


def _covered(model: ModelPatcher, sites: Mapping[str, JointSite]) -> str:
    """A sentence about what was put in place of blocks with joint mixers after them."""
    there = [model.object_patches.get(forward_key(site)) for site in sites.values()]  # type: ignore[arg-type]
    foreign = {name_of(forward) for forward in there if not isinstance(forward, JointForward | None)}
    if not foreign:
        return ""
    return (
        f"{', '.join(sorted(foreign))} stands in place of blocks with joint mixers, which do not run there; "
        "put ΔConv Patch Model after that node"
    )


def _tell_after_sampling(sites: Mapping[str, JointSite], told: Told) -> Callable[..., Any]:
    """An OUTER_SAMPLE wrapper that says what ran where, and what was put on the MODEL after; the log has each
    sentence once, the node shows them after every sampling."""

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        warn_once(_covered(executor.class_obj.model_patcher, sites), told.said)
        try:
            return executor(*args, **kwargs)
        finally:
            lines = told.lines()
            for line in lines:
                if line not in told.said:
                    log.info("ΔConv: %s", line)
            told.said.update(lines)
            if lines:
                told.show("\n".join(lines))

    return wrapper
