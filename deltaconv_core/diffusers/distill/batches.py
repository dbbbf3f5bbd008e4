"""Batches by number, each process's part of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...distill import Batch
from ...distill.order import Order
from ...distill.session import draw
from .accelerated import AcceleratedProcesses
from .cache import read
from .network import DiffusersNetwork
from .samples import Samples


class Batches:
    """Everything about a batch follows from its number and the seed; each process takes an equal part.

    Args:
        network: that learns; the batches are on its device.
        samples: what to learn from. Those of a batch have one size.
        batch_size: samples of all processes together.
        seed: what everything random follows from.
        dropout: part of the captions that the empty one stands in for, picture by picture.
        processes: those that train together.

    Raises:
        DeltaConvError: batches that cannot be shared out equally.
    """

    def __init__(
        self,
        network: DiffusersNetwork,
        samples: Samples,
        batch_size: int,
        seed: int,
        dropout: float,
        processes: AcceleratedProcesses,
    ) -> None:
        self.network = network
        self.samples = samples
        self.seed = seed
        self.dropout = dropout
        self.device = processes.device
        self.order = Order(samples.groups(), batch_size, seed)
        self.part = processes.part(batch_size)

    def __call__(self, number: int) -> Batch:
        chosen = [self.samples.samples[i] for i in self.order(number)]
        mine = chosen[self.part]
        clean = torch.cat([read(sample.latent)["latent"] for sample in mine])
        teacher = self.network.teacher
        shape = len(chosen), *clean.shape[1:]
        drawn = draw(self.seed, number, shape, len(teacher.alphas), self.dropout)
        noise, steps, dropped = (part[self.part] for part in drawn)
        files = [
            self.samples.empty if drop else sample.texts
            for sample, drop in zip(mine, dropped.tolist(), strict=True)
        ]
        texts = _joined([read(file) for file in files])
        texts = {name: self._ready(tensor) for name, tensor in texts.items()}
        conditioning = teacher.family.conditioning(texts, [sample.cut for sample in mine])
        device = self.device
        return self.network.batch(clean.to(device), noise.to(device), steps.to(device), conditioning)

    def _ready(self, tensor: Tensor) -> Tensor:
        dtype: Any = self.network.model.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(self.device, dtype)


def _joined(texts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([one[name] for one in texts]) for name in texts[0]}
