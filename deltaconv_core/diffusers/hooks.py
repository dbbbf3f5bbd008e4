"""What the sites must know of a call, handed down from the modules that are told.

`Transformer2DModel` and `PixArtTransformer2DModel` see the height and width of their input, and the model
sees the timestep; their blocks see neither. Forward pre-hooks put both among the `cross_attention_kwargs`,
which every block passes on to its attentions. So nothing is kept between calls, and threads that share a
model, gradient checkpointing and calls inside calls cannot mix them up.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import DeltaConvError
from ..sites.sampling_range import SamplingRange
from .sites import Stack

GRID = "deltaconv_grid"
CHOICE = "deltaconv_choice"
CROSS = "cross_attention_kwargs"

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Arguments]
"""A forward pre-hook that is told the keyword arguments."""


@dataclass(frozen=True)
class Argument:
    """One argument of a module's forward, by name or by position."""

    name: str
    position: int

    @classmethod
    def of(cls, module: nn.Module, name: str) -> Argument:
        names = list(inspect.signature(type(module).forward).parameters)
        if name not in names:
            raise DeltaConvError(
                f"{type(module).__name__} takes no argument {name}, which ΔConv has to see; its forward "
                f"takes {', '.join(names[1:])}; use a version of diffusers that has it"
            )
        return cls(name, names.index(name) - 1)

    def get(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return args[self.position] if len(args) > self.position else kwargs.get(self.name)

    def put(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], value: Any) -> Arguments:
        if len(args) > self.position:
            return (*args[: self.position], value, *args[self.position + 1 :]), dict(kwargs)
        return args, {**kwargs, self.name: value}


@dataclass(frozen=True)
class TellGrid:
    """On a stack of transformer blocks: tells (H, W) of the tokens to every attention in it."""

    patch_size: int
    input: Argument
    cross: Argument

    @classmethod
    def of(cls, module: nn.Module, patch_size: int) -> TellGrid:
        return cls(patch_size, Argument.of(module, "hidden_states"), Argument.of(module, CROSS))

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        height, width = self.input.get(args, kwargs).shape[-2:]
        grid = (height // self.patch_size, width // self.patch_size)
        return self.cross.put(args, kwargs, {**(self.cross.get(args, kwargs) or {}), GRID: grid})


def grid_hooks(stack: Stack, attentions: Iterable[nn.Module]) -> list[tuple[nn.Module, Hook]]:
    """What tells the grid to those of the attentions that stand in a stack, and to no others in it."""
    told = {id(attention) for attention in attentions}
    others = [attention for attention in stack.attentions() if id(attention) not in told]
    if len(others) == len(list(stack.attentions())):
        return []
    tell: Hook = TellGrid.of(stack.module, stack.patch_size)
    return [(stack.module, tell), *((attention, keep_back) for attention in others)]


@dataclass(frozen=True)
class TellChoice:
    """On the model: tells every stack whether ΔConv runs at this timestep.

    Args:
        sampling: where ΔConv runs.
        train_timesteps: T; the timesteps of the model go from T - 1, noise, to 0, the picture.
    """

    sampling: SamplingRange
    train_timesteps: int
    timestep: Argument
    cross: Argument

    @classmethod
    def of(cls, model: nn.Module, sampling: SamplingRange, train_timesteps: int) -> TellChoice:
        arguments = Argument.of(model, "timestep"), Argument.of(model, CROSS)
        return cls(sampling, train_timesteps, *arguments)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        timesteps = torch.as_tensor(self.timestep.get(args, kwargs))
        choice = self.sampling.choose(timesteps, self.timestep_at)
        return self.cross.put(args, kwargs, {**(self.cross.get(args, kwargs) or {}), CHOICE: choice})

    def timestep_at(self, percent: float) -> float:
        """The timestep at a fraction of the sampling, as ComfyUI counts it: no timestep is before 0."""
        return (1 - percent) * (self.train_timesteps - 1) if percent > 0 else float("inf")


@dataclass(frozen=True)
class KeepBack:
    """On a stack without ΔConv: what was told is not passed on."""

    cross: Argument

    @classmethod
    def of(cls, module: nn.Module) -> KeepBack:
        return cls(Argument.of(module, CROSS))

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        told = self.cross.get(args, kwargs)
        return self.cross.put(args, kwargs, without(told)) if told else (args, kwargs)


def keep_back(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """On an attention without ΔConv, which does not know what was told and would warn of it."""
    return args, without(kwargs)


def without(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are not ours."""
    return {name: value for name, value in kwargs.items() if name not in (GRID, CHOICE)}
