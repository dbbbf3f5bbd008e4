"""Which samples are in the batch of a number, and the random numbers of that batch.

Everything random about a batch follows from the seed and the batch's number, so a resumed run
sees the very batches it would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


class Order:
    """The order of the data: every sample once a pass, in another order each time.

    Args:
        groups: numbers of samples that may share a batch.
        batch_size: samples in each batch; the last of a group take in some from its beginning.
        seed: what the order follows from.

    Attributes:
        per_epoch: batches in one pass through the data.
    """

    def __init__(self, groups: Sequence[Sequence[int]], batch_size: int, seed: int) -> None:
        self.groups = groups
        self.batch_size = batch_size
        self.seed = seed
        self.per_epoch = sum(-(-len(group) // batch_size) for group in groups)
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def __call__(self, number: int) -> list[int]:
        """The numbers of the samples in the batch of a number."""
        epoch, place = divmod(number, self.per_epoch)
        if self._epoch[0] != epoch:
            random = generator(self.seed, "epoch", epoch)
            batches = [batch for group in self.groups for batch in self._split(_shuffled(group, random))]
            self._epoch = epoch, _shuffled(batches, random)
        return self._epoch[1][place]

    def _split(self, group: Sequence[int]) -> Iterator[list[int]]:
        for start in range(0, len(group), self.batch_size):
            yield [group[i % len(group)] for i in range(start, start + self.batch_size)]


def generator(seed: int, what: str, number: int) -> torch.Generator:
    """Random numbers on the CPU that follow from these three alone."""
    digest = hashlib.sha256(f"{seed} {what} {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def _shuffled(items: Sequence[T], random: torch.Generator) -> list[T]:
    return [items[i] for i in torch.randperm(len(items), generator=random).tolist()]
