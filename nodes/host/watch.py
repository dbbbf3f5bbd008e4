"""Watching the self-attention of a MODEL while it samples, on a clone that is thrown away afterwards."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from .model.attend import Forward, intercepted
from .model.joint import JointSite, JointSites, Tokens
from .model.sampler_call import COMPILED
from .model.sites import Site, uncompiled
from .model.standing import own_forward
from .patch.applied import without_blocks
from .patch.conflicts import GUIDANCE_KEYS

CFG_KEYS = ("disable_cfg1_optimization", *GUIDANCE_KEYS)
"""ComfyUI's keys of all that changes what guidance does (PAG, SAG, RescaleCFG, ...)."""

WATCH_KEY = "deltaconv_watch"
See = Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, int], torch.Tensor | None], None]
"""Is told (site id, q, k, v (B, heads, N, d), grid, mask or None) of a call."""
SeeJoint = Callable[[JointSite, Tokens, tuple[Any, ...], tuple[Any, ...], dict[str, Any]], None]
"""Is told (site, tokens, (q, k, v, mask or None) by head, arguments and keyword arguments of the block)."""


def plain(model: ModelPatcher) -> ModelPatcher:
    """A clone without ΔConv, compiled code, which would hide the attention, and additions to guidance."""
    clone = uncompiled(without_blocks(model).clone())
    clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, COMPILED)
    for key in CFG_KEYS:
        clone.model_options.pop(key, None)
    return clone


def watch_sites(
    clone: ModelPatcher, sites: Iterable[Site], see: See, wanted: Callable[[], bool] = lambda: True
) -> None:
    """Has `see` told of every call of the attentions, before they answer.

    Args:
        clone: of a MODEL, that nobody else uses.
        sites: those that are looked at.
        see: what is told.
        wanted: asked before each call; False: `see` is not told of it.
    """
    for site in sites:
        forward = own_forward(clone.model, site.path)
        clone.add_object_patch(f"{site.path}.forward", _watched(site, forward, see, wanted))


def _watched(site: Site, forward: Forward, see: See, wanted: Callable[[], bool]) -> Forward:
    def run(x: torch.Tensor, *args: Any, **call: Any) -> torch.Tensor:
        if not wanted():
            return forward(x, *args, **call)
        grid = site.grid_of(x, call)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> None:
            see(site.id, q, k, v, grid, mask)

        return intercepted(forward, attend)(x, *args, **call)

    return run


def watch_joint(
    clone: ModelPatcher, found: JointSites, see: SeeJoint, wanted: Callable[[], bool] = lambda: True
) -> None:
    """Has `see` told of every call of the joint attentions, before they answer; arguments as for
    `watch_sites`."""
    running: list[Tokens] = []

    def wrapper(executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        running[:] = [found.tokens(x)]
        return executor(x, *args, **kwargs)

    def watched(site: JointSite, forward: Forward) -> Forward:
        def run(*args: Any, **call: Any) -> Any:
            if not wanted() or not running:
                return forward(*args, **call)

            def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> None:
                see(site, running[0], (q, k, v, mask), args, call)

            return intercepted(forward, attend)(*args, **call)

        return run

    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, WATCH_KEY, wrapper)
    for site in found.sites:
        clone.add_object_patch(f"{site.path}.forward", watched(site, own_forward(clone.model, site.path)))


def fitting(model: ModelPatcher, latent: dict[str, Any]) -> torch.Tensor:
    """An empty latent in the model's channels and, where this ComfyUI knows how, at the model's scale."""
    fix = comfy.sample.fix_empty_latent_channels
    known = {name: latent[name] for name in inspect.signature(fix).parameters if name in latent}
    return fix(model, latent["samples"], **known)


def sample(
    clone: ModelPatcher,
    conditions: dict[str, Any],
    samples: torch.Tensor,
    steps: int,
    seed: int,
    turn_to: Callable[[int], None],
    guidance: float = 1.0,
) -> None:
    """Euler steps from noise to picture.

    Args:
        clone: of a MODEL.
        conditions: "positive", and "negative" where there is guidance.
        samples: (B, C, ..., H, W), whose size and content the sampling starts from.
        steps: how many.
        seed: of the noise.
        turn_to: told the number of each step before it, and at last their number.
        guidance: cfg; 1: none, and one call of the network for each step.
    """
    noise = comfy.sample.prepare_noise(samples, seed)
    schedule = clone.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(schedule, "simple", steps)
    guider = comfy.samplers.CFGGuider(clone)
    guider.inner_set_conds(conditions)
    guider.set_cfg(guidance)
    turn_to(0)
    guider.sample(
        noise,
        samples,
        comfy.samplers.sampler_object("euler"),
        sigmas,
        callback=lambda step, *_: turn_to(step + 1),
        disable_pbar=True,
        seed=seed,
    )
