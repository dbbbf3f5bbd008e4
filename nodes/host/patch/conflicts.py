"""What else on a MODEL acts on self-attention, and so cannot act, or not fully, where ΔConv stands."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from types import CellType, CodeType, FunctionType
from typing import Any

from comfy.model_patcher import ModelPatcher

from ..model.sites import Site
from ..model.standing import forward_set_on
from .forwards import MixerForward
from .site_patch import forward_key

GUIDANCE_KEYS = (
    "sampler_calc_cond_batch_function",
    "sampler_cfg_function",
    "sampler_post_cfg_function",
    "sampler_pre_cfg_function",
)
"""ComfyUI's keys of what works on guidance, and may run the network in passes of its own."""

log = logging.getLogger(__name__)


def conflicts(model: ModelPatcher, sites: Mapping[str, Site], keeps_projections: bool) -> list[str]:
    """One sentence for each, naming both.

    Args:
        model: ModelPatcher, before or after ΔConv was put on.
        sites: where ΔConv stands, by id.
        keeps_projections: whether the layers of the self-attention still run there.
    """
    patches, replace = _attention_patches(model.model_options["transformer_options"])
    found = [
        "" if keeps_projections else _weight_patches(model, sites),
        _forwards(model, sites),
        _forwards_around(model, sites),
        _attn1_patches(patches, keeps_projections),
        replacements(replace, sites),
        _guidance(name_of(function) for function in _guides(model)),
    ]
    return [sentence for sentence in found if sentence]


def warn_when_sampling(
    sites: Mapping[str, Site], keeps_projections: bool, said: set[str]
) -> Callable[..., Any]:
    """An OUTER_SAMPLE wrapper that logs, once, what was put on the MODEL after ΔConv.

    Args:
        sites: where ΔConv stands, by id.
        keeps_projections: as for `conflicts`.
        said: sentences that the user has read already; others are added.
    """

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        for sentence in conflicts(executor.class_obj.model_patcher, sites, keeps_projections):
            warn_once(sentence, said)
        return executor(*args, **kwargs)

    return wrapper


def warn_of_passes(sites: Mapping[str, Site], said: set[str]) -> Callable[..., Any]:
    """A CALC_COND_BATCH wrapper that logs, once, which guidance has passes with other attn1 patches than the
    MODEL's, if its code did not show it before.

    Args:
        sites, said: as in `warn_when_sampling`.
    """

    def wrapper(executor: Any, base: Any, conds: Any, x: Any, sigma: Any, options: dict[str, Any]) -> Any:
        model = base.current_patcher
        if model is not None:
            warn_once(_guidance(_of_pass(model, options["transformer_options"], sites)), said)
        return executor(base, conds, x, sigma, options)

    return wrapper


def warn_once(sentence: str, said: set[str]) -> None:
    """Logs a sentence that was not said yet; nothing for an empty one."""
    if sentence and sentence not in said:
        said.add(sentence)
        log.warning("ΔConv: %s", sentence)


def foreign_forward(model: ModelPatcher, site: Site) -> Any:
    """What stands as the forward of a self-attention, put there by a patch or in place; None: its class's."""
    patch = model.object_patches.get(forward_key(site))
    return patch if patch is not None else forward_set_on(model, site.path)


def _weight_patches(model: ModelPatcher, sites: Mapping[str, Site]) -> str:
    prefixes = tuple(f"{site.path}." for site in sites.values())
    keys = [key for key in model.patches if key.startswith(prefixes)]
    if not keys:
        return ""
    replaced = {key.rpartition(".attn")[0] for key in keys}
    return (
        f"a LoRA (or another weight patch) changes {len(keys)} weights of the self-attention at "
        f"{len(replaced)} sites where ΔConv stands; that part of it has no effect while ΔConv runs"
    )


def _forwards(model: ModelPatcher, sites: Mapping[str, Site]) -> str:
    prefixes = tuple(f"{site.path}." for site in sites.values())
    patches = [patch for key, patch in model.object_patches.items() if f"{key}.".startswith(prefixes)]
    covered = [forward_set_on(model, site.path) for site in sites.values()]
    foreign = {name_of(patch) for patch in [*patches, *covered] if not isinstance(patch, MixerForward | None)}
    if not foreign:
        return ""
    return f"{_list(foreign)} replaces self-attention where ΔConv stands; only one of the two can act"


def _forwards_around(model: ModelPatcher, sites: Mapping[str, Site]) -> str:
    """Patches of the blocks that the sites are in, and of what these are in, but for the whole network."""
    parts = [site.path.split(".") for site in sites.values()]
    around = {f"{'.'.join(p[:end])}.forward" for p in parts for end in range(2, len(p))}
    foreign = {name_of(patch) for key, patch in model.object_patches.items() if key in around}
    if not foreign:
        return ""
    return (
        f"{_list(foreign)} changes what runs around the self-attention where ΔConv stands. ΔConv goes by the "
        "places of the tokens: where these are put in another order (Token Perturbation Guidance), it "
        "answers otherwise than attention"
    )


def _attn1_patches(patches: Iterable[Any], keeps_projections: bool) -> str:
    names = {name_of(patch) for patch in patches}
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
    hit = _hit(replace, sites)
    if not hit:
        return ""
    names = {name_of(patch) for key, patch in replace.items() if any(key in (b, b[:2]) for b in hit)}
    return (
        f"{_list(names)} replaces the self-attention of {len(hit)} blocks where ΔConv stands (attn1 "
        "replace): there it runs on the attention's own projections, and ΔConv does not run"
    )


def _hit(replace: Mapping[Any, Any], sites: Mapping[str, Site]) -> set[tuple[str, int, int]]:
    """The sites' blocks that attn1 replace patches act on."""
    blocks = {site.block for site in sites.values() if site.block is not None}
    # ComfyUI looks a patch up by (side, number, index) first, then by (side, number).
    return {b for b in blocks if b in replace or b[:2] in replace}


def _guidance(names: Iterable[str]) -> str:
    names = set(names)
    if not names:
        return ""
    return (
        f"{_list(names)} guides by self-attention: in its own pass some blocks run attention where ΔConv "
        "stands, so it also measures the difference between the two; use a low scale or none"
    )


def _guides(model: ModelPatcher) -> list[Callable[..., Any]]:
    """The guidance on a MODEL whose code has to do with attn1 patches."""
    options = model.model_options
    functions = [options[key] for key in GUIDANCE_KEYS if key in options]
    flat = [f for found in functions for f in (found if isinstance(found, list) else [found])]
    return [function for function in flat if _names_attn1(function, set())]


def _names_attn1(thing: Any, seen: set[int]) -> bool:
    """Whether "attn1" stands in the code of a function, or of those inside it and in its closure."""
    if id(thing) in seen:
        return False
    seen.add(id(thing))
    if isinstance(thing, CodeType):
        words = [*thing.co_names, *(c for c in thing.co_consts if isinstance(c, str))]
        return any("attn1" in word for word in words) or any(
            _names_attn1(c, seen) for c in thing.co_consts if isinstance(c, CodeType)
        )
    function = getattr(thing, "func", thing)  # of a partial
    if not callable(function) or isinstance(function, type):
        return False
    for attribute in ("__func__", "__wrapped__"):  # of a method, of a decorated function
        function = getattr(function, attribute, function)
    if not isinstance(function, FunctionType):
        function = getattr(type(function).__call__, "__func__", type(function).__call__)
    if not isinstance(function, FunctionType):
        return False  # of a compiled language
    inside = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
    return _names_attn1(function.__code__, seen) or any(
        _names_attn1(f, seen) for f in inside if isinstance(f, FunctionType)
    )


def _filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (raises where there is nothing yet)
    except ValueError:
        return False
    return True


def _of_pass(model: ModelPatcher, options: Mapping[str, Any], sites: Mapping[str, Site]) -> set[str]:
    """What acts on the sites' self-attention in one pass, but not on the MODEL itself.

    Left out are those of a package whose guidance was recognised by its code.
    """
    own_patches, own_replace = _attention_patches(model.model_options["transformer_options"])
    patches, replace = _attention_patches(options)
    added = [patch for patch in patches if not any(patch is own for own in own_patches)]
    added += [
        patch
        for key, patch in replace.items()
        if own_replace.get(key) is not patch and _hit({key: patch}, sites)
    ]
    told = {_package(function) for function in _guides(model)} if added else set()
    return {name_of(patch) for patch in added if _package(patch) not in told}


def _attention_patches(options: Mapping[str, Any]) -> tuple[list[Any], dict[Any, Any]]:
    """The attn1 patches and attn1 replace patches in transformer_options."""
    return options.get("patches", {}).get("attn1_patch", []), options.get("patches_replace", {}).get(
        "attn1", {}
    )


def _package(function: Any) -> str:
    return str(getattr(function, "__module__", "")).rpartition(".")[0]


def name_of(patch: Any) -> str:
    """The node or class that a patch comes from."""
    function = getattr(patch, "func", patch)
    return getattr(function, "__qualname__", type(function).__qualname__).split(".")[0]


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
