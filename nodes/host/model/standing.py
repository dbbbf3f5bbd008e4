"""What stands at a place of a MODEL: its own modules and forwards, or what object patches put there.

ComfyUI sets object patches in the order in which they were added, and takes them off in that order too. So a
patch inside a module that another patch put there would end up inside the model's own module, for good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ....deltaconv_core.errors import DeltaConvError

Forward = Callable[..., torch.Tensor]


def check_reach(model: ModelPatcher, paths: Iterable[str], remedy: str) -> None:
    """Checks that patches at these modules would act on the base model's own ones.

    Args:
        model: ModelPatcher; another clone may be loaded.
        paths: of modules, from the BaseModel.
        remedy: what the user can do, for messages.

    Raises:
        DeltaConvError: an object patch of the MODEL puts another module there, or above; nothing was changed.
    """
    own = model.object_patches_backup
    as_loaded = {**own, **model.object_patches}
    for path in paths:
        if _reached(model.model, path, own) is not _reached(model.model, path, as_loaded):
            there = [key for key in model.object_patches if f"{path}.".startswith(f"{key}.")]
            name = type(model.object_patches[max(there, key=len)]).__qualname__
            raise DeltaConvError(
                f"another node puts a module of its own ({name}) at {max(there, key=len)}, in place of the "
                "self-attention or around it. ComfyUI could not take that and a patch inside it off again "
                f"without damage to the model; {remedy}"
            )


def standing_forward(model: ModelPatcher, path: str) -> Forward:
    """The forward that the base model itself has at a module, set on the module or its class's.

    Args:
        model: ModelPatcher; it or another clone may be loaded.
        path: of the module from the BaseModel.
    """
    before = model.object_patches_backup
    forward = before.get(f"{path}.forward")
    return _reached(model.model, path, before).forward if forward is None else forward


def forward_set_on(model: ModelPatcher, path: str) -> Forward | None:
    """The forward that was set on a module of the base model in place; None where it is its class's.

    Args:
        model, path: as in `standing_forward`.
    """
    module = _reached(model.model, path, model.object_patches_backup)
    forward = standing_forward(model, path)
    return None if forward == type(module).forward.__get__(module) else forward


def own_forward(model: torch.nn.Module, path: str) -> Forward:
    """The forward as the module's class has it, bound to the module in this very model.

    A MODEL can be rebuilt under its patches (a deep clone), so the module is looked up when it is needed.
    """
    module = comfy.utils.get_attr(model, path)
    return type(module).forward.__get__(module)


@contextmanager
def own_modules(model: ModelPatcher) -> Iterator[None]:
    """Inside, the base model has its own modules, whatever modules a loaded clone put in their place."""
    before = model.object_patches_backup.items()
    own = [(key, module) for key, module in before if isinstance(module, torch.nn.Module)]
    swapped = [(key, comfy.utils.set_attr(model.model, key, module)) for key, module in own]
    try:
        yield
    finally:
        for key, module in reversed(swapped):
            comfy.utils.set_attr(model.model, key, module)


def _reached(base: torch.nn.Module, path: str, objects: Mapping[str, Any]) -> Any:
    """What a path leads to where `objects` stand, by path; None where it leads nowhere."""
    reached: Any = base
    parts = path.split(".")
    for i, part in enumerate(parts, 1):
        key = ".".join(parts[:i])
        reached = objects[key] if key in objects else getattr(reached, part, None)
    return reached
