"""What one call of the network must know at its sites when more than a fixed block may run there.

ComfyUI hands the noise level to U-Nets' attention, but not to PixArt's, and reading it at every site would
wait for the GPU every time. So it is read once per call of the model, and kept for the time of that call and
no longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import comfy.utils
import torch

from ....deltaconv_core.errors import DeltaConvError
from ....deltaconv_core.sites.sampling_range import Choice, SamplingRange


@dataclass(frozen=True)
class Call:
    """One call of a model: the choice, and the attention's own forward by path where it may be needed."""

    choice: Choice
    attention: dict[str, Callable[..., torch.Tensor]]


_calls: ContextVar[Mapping[object, Call]] = ContextVar("deltaconv_calls", default=MappingProxyType({}))


def watch_calls(
    owner: object, sampling: SamplingRange, paths: Iterable[str], needs_attention: bool = False
) -> Callable[..., torch.Tensor]:
    """An APPLY_MODEL wrapper that makes the choice for every call of the model.

    Args:
        owner: the patch that asks; others have calls of their own.
        sampling: where the mixer runs.
        paths: of the attention modules from the BaseModel.
        needs_attention: whether the attention's own forward is wanted where the mixer runs, too.
    """
    paths = tuple(paths)

    def wrapper(
        executor: Any, x: torch.Tensor, sigmas: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        model = executor.class_obj
        choice: Choice = True
        if not sampling.is_everything:
            choice = sampling.choose(sigmas, model.model_sampling.percent_to_sigma)
        wanted = paths if needs_attention or choice is not True else ()
        attention = {path: own_forward(model, path) for path in wanted}
        token = _calls.set({**_calls.get(), owner: Call(choice, attention)})
        try:
            return executor(x, sigmas, *args, **kwargs)
        finally:
            _calls.reset(token)

    return wrapper


def current_call(owner: object, advice: str) -> Call:
    """The running call of the owner's model.

    Raises:
        DeltaConvError: the model is run in a way that ComfyUI's wrappers do not see.
    """
    call = _calls.get().get(owner)
    if call is None:
        raise DeltaConvError(
            "something runs this MODEL's network directly, past ComfyUI's wrappers, so neither the noise "
            f"level nor the attention behind a patch is known; {advice}"
        )
    return call


def own_forward(model: torch.nn.Module, path: str) -> Callable[..., torch.Tensor]:
    """The attention's forward as its class has it, bound to the module in this very model.

    A MODEL can be rebuilt under its patches (a deep clone), so the module is looked up when it is needed.
    """
    module = comfy.utils.get_attr(model, path)
    return type(module).forward.__get__(module)
