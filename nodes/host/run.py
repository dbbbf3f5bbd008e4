"""What one call of the network must know at its sites when ΔConv runs in a part of the sampling only.

ComfyUI hands the noise level to U-Nets' attention, but not to PixArt's, and reading it at every site would
wait for the GPU every time. So it is read once per call of the model, and kept for the time of that call and
no longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import comfy.utils
import torch

from ...deltaconv_core.errors import DeltaConvError
from ...deltaconv_core.switch import Choice, SamplingRange


@dataclass(frozen=True)
class Call:
    """One call of a model: who asked for it, the choice, and the attention's own forward by path."""

    owner: object
    choice: Choice
    attention: dict[str, Callable[..., torch.Tensor]]


_call: ContextVar[Call | None] = ContextVar("deltaconv_call", default=None)


def watch_calls(owner: object, sampling: SamplingRange, paths: Iterable[str]) -> Callable[..., torch.Tensor]:
    """An APPLY_MODEL wrapper that makes the choice for every call of the model.

    Args:
        owner: the patch that asks; calls of other patches are not answered.
        sampling: where ΔConv runs.
        paths: of the attention modules from the BaseModel.
    """
    paths = tuple(paths)

    def wrapper(
        executor: Any, x: torch.Tensor, sigmas: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        model = executor.class_obj
        choice = sampling.choose(sigmas, model.model_sampling.percent_to_sigma)
        attention = {} if choice is True else {path: own_forward(model, path) for path in paths}
        token = _call.set(Call(owner, choice, attention))
        try:
            return executor(x, sigmas, *args, **kwargs)
        finally:
            _call.reset(token)

    return wrapper


def current_call(owner: object) -> Call:
    """The running call of the owner's model.

    Raises:
        DeltaConvError: the model is run in a way that ComfyUI's wrappers do not see.
    """
    call = _call.get()
    if call is None or call.owner is not owner:
        raise DeltaConvError(
            "ΔConv was asked to run in a part of the sampling, but something runs this MODEL's network "
            "directly, so the noise level is not known; set start_percent to 0 and end_percent to 1"
        )
    return call


def own_forward(model: torch.nn.Module, path: str) -> Callable[..., torch.Tensor]:
    """The attention's forward as its class has it, bound to the module in this very model.

    A MODEL can be rebuilt under its patches (a deep clone), so the module is looked up when it is needed.
    """
    module = comfy.utils.get_attr(model, path)
    return type(module).forward.__get__(module)
