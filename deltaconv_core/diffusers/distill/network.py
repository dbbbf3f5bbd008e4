"""A diffusers model as `deltaconv_core.distill.Network`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...distill import Batch
from ...distill.replaced import replaced
from ..hooks import GRID, grid_hooks, without
from .teacher import Teacher


@dataclass(frozen=True)
class Inputs:
    """What the network is called with beside noisy latents.

    Args:
        timesteps: (B,)
        conditioning: arguments by name.
    """

    timesteps: Tensor
    conditioning: dict[str, Any]


class DiffusersNetwork:
    """A teacher's network, and where things are in it.

    Args:
        teacher: with its network on the device that is trained on.
        sites: ids of those to be learned.
    """

    def __init__(self, teacher: Teacher, sites: Iterable[str]) -> None:
        self.teacher = teacher
        self.model = teacher.network
        self.prediction = teacher.prediction
        self.attentions = {site: teacher.sites.attentions[site] for site in sites}
        self.grids = dict.fromkeys(self.attentions, _told)
        self.streams = {site: _stream(self.model, site) for site in self.attentions}
        self.segments = _segments(self.model)

    def __call__(self, batch: Batch) -> Tensor:
        """(B, C, H, W); where the variance is learned too, it is left out."""
        inputs: Inputs = batch.inputs
        y: Tensor = self.model(batch.noisy, timestep=inputs.timesteps, **inputs.conditioning).sample
        return y[:, : batch.noisy.shape[1]]

    def batch(self, clean: Tensor, noise: Tensor, timesteps: Tensor, conditioning: dict[str, Any]) -> Batch:
        """A batch of clean latents (B, C, H, W) under noise at timesteps (B,)."""
        alphas = self.teacher.alphas.to(clean.device)[timesteps]
        signal, spread = alphas.sqrt().view(-1, 1, 1, 1), (1 - alphas).sqrt().view(-1, 1, 1, 1)
        noisy = signal * clean + spread * noise
        target = noise if self.prediction == "epsilon" else signal * noise - spread * clean
        return Batch(
            noisy.to(self.model.dtype), target, alphas / (1 - alphas), Inputs(timesteps, conditioning)
        )

    @contextmanager
    def told(self) -> Iterator[None]:
        """Inside, the calls of the attentions carry the grid of their tokens, which they do not see."""
        own = [(attention, _Without(attention.forward)) for attention in self.attentions.values()]
        with replaced(own), ExitStack() as hooks:
            for stack in self.teacher.sites.stacks:
                for module, hook in grid_hooks(stack, self.attentions.values()):
                    hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield


@dataclass(frozen=True, eq=False)
class _Without:
    """An attention's forward, called without what was told."""

    forward: Callable[..., Tensor]

    def __call__(self, *args: Any, **call: Any) -> Tensor:
        return self.forward(*args, **without(call))


def _told(x: Tensor, call: Mapping[str, Any]) -> tuple[int, int]:
    grid: tuple[int, int] = call[GRID]
    return grid


def _stream(model: nn.Module, site: str) -> nn.Module:
    """The module that reads the residual stream right after the attention."""
    block: Any = model.get_submodule(site.rpartition(".")[0])
    if block.attn2 is None:
        return block.norm3  # type: ignore[no-any-return]
    # In PixArt nothing is normalized before the cross-attention.
    return block.attn2 if block.norm_type == "ada_norm_single" else block.norm2  # type: ignore[no-any-return]


def _segments(model: nn.Module) -> list[nn.Module]:
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    return [part for part in model.modules() if isinstance(part, (BasicTransformerBlock, ResnetBlock2D))]
