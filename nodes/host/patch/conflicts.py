"""What else on a MODEL acts on self-attention, and so cannot act, or not fully, where ΔConv stands."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..model.sites import Site
from .forwards import MixerForward

# Guidance that runs attn1 replace patches in passes of its own; nothing but its name shows that beforehand.
GUIDANCE = (
    "PerturbedAttention",
    "PerturbedAttentionGuidance",
    "SelfAttentionGuidance",
    "SmoothedEnergyGuidance",
)

log = logging.getLogger(__name__)


def conflicts(model: Any, sites: Mapping[str, Site], keeps_projections: bool) -> list[str]:
    """One sentence for each, naming both.

    Args:
        model: ModelPatcher, before or after ΔConv was put on.
        sites: where ΔConv stands, by id.
        keeps_projections: whether the layers of the self-attention still run there.
    """
    options = model.model_options
    patches = options["transformer_options"].get("patches", {})
    replace = options["transformer_options"].get("patches_replace", {}).get("attn1", {})
    found = [
        "" if keeps_projections else _weight_patches(model, sites),
        _forwards(model, sites),
        _attn1_patches(patches.get("attn1_patch", []), keeps_projections),
        replacements(replace, sites),
        _guidance(options.get("sampler_post_cfg_function", [])),
    ]
    return [sentence for sentence in found if sentence]


def warn_when_sampling(
    sites: Mapping[str, Site], keeps_projections: bool, said: Iterable[str]
) -> Callable[..., Any]:
    """An OUTER_SAMPLE wrapper that logs what was put on the MODEL after ΔConv.

    Args:
        sites: where ΔConv stands, by id.
        keeps_projections: as for `conflicts`.
        said: sentences that the user has read already.
    """
    said = frozenset(said)

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        for sentence in conflicts(executor.class_obj.model_patcher, sites, keeps_projections):
            if sentence not in said:
                log.warning("ΔConv: %s", sentence)
        return executor(*args, **kwargs)

    return wrapper


def _weight_patches(model: Any, sites: Mapping[str, Site]) -> str:
    prefixes = tuple(f"{site.path}." for site in sites.values())
    keys = [key for key in model.patches if key.startswith(prefixes)]
    if not keys:
        return ""
    replaced = {key.rpartition(".attn")[0] for key in keys}
    return (
        f"a LoRA (or another weight patch) changes {len(keys)} weights of the self-attention at "
        f"{len(replaced)} sites where ΔConv stands; that part of it has no effect while ΔConv runs"
    )


def _forwards(model: Any, sites: Mapping[str, Site]) -> str:
    prefixes = tuple(f"{site.path}." for site in sites.values())
    foreign = {
        _name(patch)
        for key, patch in model.object_patches.items()
        if f"{key}.".startswith(prefixes) and not isinstance(patch, MixerForward)
    }
    if not foreign:
        return ""
    return f"{_list(foreign)} replaces self-attention where ΔConv stands; only one of the two can act"


def _attn1_patches(patches: Iterable[Any], keeps_projections: bool) -> str:
    names = {_name(patch) for patch in patches}
    if not names:
        return ""
    if keeps_projections:
        return (
            f"{_list(names)} changes the input of the self-attention (attn1 patch): it acts, but where it "
            "changes the number of tokens (HyperTile, ToMe), sampling stops with an error"
        )
    return (
        f"{_list(names)} changes the input of the self-attention (attn1 patch): ΔConv has no keys and values "
        "to change, and stops with an error where the number of tokens changes (HyperTile, ToMe)"
    )


def replacements(replace: Mapping[Any, Any], sites: Mapping[str, Site]) -> str:
    """A sentence about attn1 replace patches at the sites, if there are any."""
    blocks = {site.block for site in sites.values() if site.block is not None}
    # ComfyUI looks a patch up by (side, number, index) first, then by (side, number).
    hit = {b for b in blocks if b in replace or b[:2] in replace}
    if not hit:
        return ""
    names = {_name(patch) for key, patch in replace.items() if any(key in (b, b[:2]) for b in hit)}
    return (
        f"{_list(names)} replaces the self-attention of {len(hit)} blocks where ΔConv stands (attn1 "
        "replace): there it runs on the attention's own projections, and ΔConv does not run"
    )


def _guidance(functions: Iterable[Any]) -> str:
    names = {_name(function) for function in functions}
    names = {name for name in names if name.startswith(GUIDANCE)}
    if not names:
        return ""
    return (
        f"{_list(names)} guides by self-attention: in its own pass some blocks run attention where ΔConv "
        "stands, so it also measures the difference between the two; use a low scale or none"
    )


def _name(patch: Any) -> str:
    """The node or class that a patch comes from."""
    function = getattr(patch, "func", patch)
    return getattr(function, "__qualname__", type(function).__qualname__).split(".")[0]


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
