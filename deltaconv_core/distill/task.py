"""What one batch teaches the blocks: a task takes a batch, sends losses backward, and returns them by name.

The network is frozen and there is one of it: it runs with its attention (teacher), then with the mixers
(student).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .losses import mean_square, min_snr_weight, output_losses, total
from .replaced import gradient_checkpointing
from .settings import Settings
from .taps import GridOf, Taps

Backward = Callable[[Tensor], None]
Losses = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """One batch.

    Args:
        noisy: (B, ...) noisy latents, as the network takes them.
        target: (B, ...) what the network is trained to predict for them.
        snr: (B,) signal-to-noise ratio alpha² / sigma².
        inputs: what else the host's network needs: timesteps, conditioning.
    """

    noisy: Tensor
    target: Tensor
    snr: Tensor
    inputs: Any = None


class Network(Protocol):
    """What a host brings: its network, frozen and in eval mode, and where things are in it.

    Attributes:
        attentions, grids: of the sites, by id (`taps.tapped`).
        streams: site id -> the module whose first argument is the residual stream right after the attention.
        segments: modules that gradient checkpointing runs one by one.
        prediction: what a call returns, "epsilon" or "v".
    """

    @property
    def attentions(self) -> Mapping[str, nn.Module]: ...

    @property
    def grids(self) -> Mapping[str, GridOf]: ...

    @property
    def streams(self) -> Mapping[str, nn.Module]: ...

    @property
    def segments(self) -> Iterable[nn.Module]: ...

    @property
    def prediction(self) -> str: ...

    def __call__(self, batch: Batch) -> Tensor:
        """The prediction (B, ...) for the batch's noisy latents."""
        ...


class LayerWise:
    """Every mixer learns its own attention's output from its own attention's input.

    The teacher runs once. As soon as an attention has answered, the mixer runs on the same input, its
    squared error goes backward through the mixer only, and both are forgotten: memory is that of a forward
    pass, one mixer's activations, and the mixers' gradients.
    """

    def __init__(self, network: Network, taps: Taps) -> None:
        self.network = network
        self.taps = taps

    def __call__(self, batch: Batch, backward: Backward) -> Losses:
        errors: list[Tensor] = []

        def learn(site: str, x: Tensor, grid: tuple[int, int], y: Tensor) -> None:
            with torch.enable_grad():
                error = mean_square(self.taps.taps[site].mixer(x, grid=grid), y)
                backward(error)
            errors.append(error.detach())

        with torch.no_grad(), self.taps.mode(mixing=False, observe=learn):
            self.network(batch)
        return {"feature": total(errors)}


class EndToEnd:
    """The paper's loss (section 4.3), through the frozen network: L = L_z + beta * L_f.

    L_z = w(t) (|| teacher - student ||² + || target - student ||²) with the Min-SNR weight; L_f is the sum
    over layers of the squared difference between mixer and attention, or of the residual streams.
    """

    def __init__(self, network: Network, taps: Taps, settings: Settings) -> None:
        self.network = network
        self.taps = taps
        self.settings = settings

    def __call__(self, batch: Batch, backward: Backward) -> Losses:
        wanted: dict[str, Tensor] = {}
        errors: dict[str, Tensor] = {}

        def compare(site: str, y: Tensor) -> None:
            errors[site] = mean_square(y, wanted[site])

        with torch.no_grad(), self._watching(False, wanted.__setitem__):
            teacher = self.network(batch)
        checkpointed = self.network.segments if self.settings.checkpointing else ()
        with gradient_checkpointing(checkpointed), self._watching(True, compare):
            student = self.network(batch)
            weight = min_snr_weight(batch.snr, self.network.prediction, self.settings.gamma)
            losses = output_losses(student, teacher, batch.target, weight.to(student.device))
            losses["feature"] = total(errors.values())
            loss = losses["teacher"] + losses["noise"] + self.settings.beta * losses["feature"]
            backward(loss)  # in here, because checkpointed segments run once more
        return {name: value.detach() for name, value in losses.items()}

    @contextmanager
    def _watching(self, mixing: bool, watch: Callable[[str, Tensor], None]) -> Any:
        """One of the two modes; `watch` sees what the feature loss compares, site by site."""
        with ExitStack() as stack:
            if self.settings.feature == "output":
                stack.enter_context(
                    self.taps.mode(mixing=mixing, observe=lambda site, x, grid, y: watch(site, y))
                )
            else:
                stack.enter_context(self.taps.mode(mixing=mixing))
                for site in self.taps.taps:
                    hook = self.network.streams[site].register_forward_pre_hook(
                        lambda module, args, site=site: watch(site, args[0])
                    )
                    stack.callback(hook.remove)
            yield
