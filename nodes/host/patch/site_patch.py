"""What travels with a MODEL on which something stands at the sites, and goes with each of its clones."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ....deltaconv_core.sites.sampling_range import Choice, SamplingRange
from ..model.sites import Site
from ..model.standing import Forward, check_reach, own_forward, standing_forward
from .current_call import Call, running

if TYPE_CHECKING:
    from typing_extensions import Self

Patch = TypeVar("Patch", bound="SitePatch")
CLONED = [
    getattr(CallbacksMP, name)
    for name in ("ON_CLONE", "ON_DEEPCLONE_MULTIGPU", "ON_MATCH_MULTIGPU_CLONES")
    if hasattr(CallbacksMP, name)
]
"""When ComfyUI says that it made a clone; older versions know one GPU only."""

REMEDY = "use that node and ΔConv on MODELs of their own, or leave the site out with the input `blocks`"


class SitePatch:
    """Stands among a MODEL's patches, where ComfyUI asks it for more models before it loads the MODEL.

    Args:
        sites: where something stands, by id.
        sampling: the part of the sampling in which it runs.
        covered: object patches of others that the MODEL had at the same places, by key.
    """

    key: str
    """Of this kind of patch among those of a MODEL."""

    def __init__(
        self, sites: Mapping[str, Site], sampling: SamplingRange, covered: Mapping[str, Any]
    ) -> None:
        self.sites = dict(sites)
        self.sampling = sampling
        self.covered = dict(covered)
        self.owner = object()
        """Of the calls; clones share it."""
        self._model: Callable[[], ModelPatcher | None] = lambda: None

    def models(self) -> list[ModelPatcher]:
        model = self._model()
        if model is not None:
            stands = [site.path for site in self.sites.values() if forward_key(site) in model.object_patches]
            check_reach(model, stands, REMEDY)
        return []

    def to(self, device_or_dtype: Any) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Up to ComfyUI 0.12, cloning a MODEL deep-copies its options; what a clone needs of its own is made
        # in `for_clone`.
        return self

    def for_clone(self, clone: ModelPatcher) -> Self:
        """This patch as it belongs to a clone of the MODEL, or to the MODEL itself."""
        own = copy.copy(self)
        own._model = weakref.ref(clone)
        return own

    @property
    def keeps_projections(self) -> bool:
        """Whether what stands at the sites runs inside the attention's own forward."""
        return False

    def watch(self) -> Callable[..., torch.Tensor]:
        """An APPLY_MODEL wrapper that says at every call of the model what the call is."""

        def wrapper(
            executor: Any, x: torch.Tensor, sigmas: torch.Tensor, *args: Any, **kwargs: Any
        ) -> torch.Tensor:
            with running(self.owner, self._call(executor.class_obj, x, sigmas)):
                return executor(x, sigmas, *args, **kwargs)

        return wrapper

    def _call(self, base: BaseModel, x: torch.Tensor, sigmas: torch.Tensor) -> Call:
        choice: Choice = True
        if not self.sampling.is_everything:
            choice = self.sampling.choose(sigmas, base.model_sampling.percent_to_sigma)
        sites = self.sites.values()
        own = {site.path: own_forward(base, site.path) for site in sites if self.keeps_projections}
        behind = {site.path: self._behind(base, site) for site in sites if choice is not True}
        return Call(choice, own, behind)

    def _behind(self, base: BaseModel, site: Site) -> Forward:
        """What would run at a site without this patch."""
        if forward_key(site) in self.covered:
            return self.covered[forward_key(site)]
        model = self._model()
        return own_forward(base, site.path) if model is None else standing_forward(model, site.path)


def forward_key(site: Site) -> str:
    """The name of a site's forward among object patches."""
    return f"{site.path}.forward"


def patches_of(model: ModelPatcher, key: str) -> list[Any]:
    """What stands on this MODEL under a key, in the order in which it was put there."""
    return model.model_options["transformer_options"].get("patches", {}).get(key, [])


def put_on(clone: ModelPatcher, patch: Patch) -> Patch:
    """Puts a patch on a clone of a MODEL, and on its clones to come; returns it as it is on this one."""
    clone.set_model_patch(patch, patch.key)
    if not clone.get_callbacks(CLONED[0], patch.key):
        for kind in CLONED:
            clone.add_callback_with_key(kind, patch.key, lambda _, new, key=patch.key: _renew(new, key))
    _renew(clone, patch.key)
    own: Patch = patches_of(clone, patch.key)[-1]
    return own


def take_off(clone: ModelPatcher, key: str) -> None:
    """Takes off what `put_on` put on a clone of a MODEL under a key."""
    del clone.model_options["transformer_options"]["patches"][key]
    clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, key)
    for kind in CLONED:
        clone.remove_callbacks_with_key(kind, key)


def _renew(clone: ModelPatcher, key: str) -> None:
    """Gives a clone patches of its own in place of those that it shares with the MODEL it was made from."""
    own = [patch.for_clone(clone) for patch in patches_of(clone, key)]
    options = clone.model_options["transformer_options"]
    patches = {**options.get("patches", {}), key: own}
    clone.model_options = {
        **clone.model_options,
        "transformer_options": {**options, "patches": patches},
    }
    clone.wrappers.setdefault(WrappersMP.APPLY_MODEL, {})[key] = [patch.watch() for patch in own]
