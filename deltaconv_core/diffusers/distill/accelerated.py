"""The processes that `accelerate launch` starts, or the only one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from ...errors import DeltaConvError

PORTION = 1 << 24
"""Numbers that travel at once."""


class AcceleratedProcesses:
    """All processes of a run, as one of them sees them (`deltaconv_core.distill.Processes`).

    Args:
        on_cpu: leave GPUs alone.
        timeout: minutes that they wait for each other.

    Raises:
        DeltaConvError: no accelerate, or processes that do not find each other.

    Attributes:
        count, number: how many there are, and which one this is.
        device: of this one.
        mixed_precision: what `accelerate launch` was given, "no" without it.
    """

    def __init__(self, on_cpu: bool, timeout: float) -> None:
        try:
            from accelerate import Accelerator, InitProcessGroupKwargs
        except ImportError as error:
            raise DeltaConvError(
                f"this needs accelerate ({error}): pip install '.[train]' in the folder of ComfyUI-DeltaConv"
            ) from error
        waiting = InitProcessGroupKwargs(timeout=timedelta(minutes=timeout))
        try:
            self._accelerator: Any = Accelerator(cpu=on_cpu, kwargs_handlers=[waiting])
        except (RuntimeError, ValueError) as error:
            raise DeltaConvError(
                f"accelerate cannot start here: {error}; run `accelerate config` again"
            ) from error
        self.count = int(self._accelerator.num_processes)
        self.number = int(self._accelerator.process_index)
        self.device: torch.device = self._accelerator.device
        self.mixed_precision = str(self._accelerator.mixed_precision)

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.number == 0

    def say(self, text: str) -> None:
        """Prints once for all of them."""
        if self.is_main:
            print(text, flush=True)

    def part(self, size: int) -> slice:
        """This process's part of a batch of so many samples.

        Raises:
            DeltaConvError: it cannot be shared out equally.
        """
        if size % self.count:
            raise DeltaConvError(
                f"batches of {size} pictures cannot be shared out among {self.count} processes equally; "
                f"choose a multiple of {self.count} for --batch-size, or other processes"
            )
        each = size // self.count
        return slice(self.number * each, (self.number + 1) * each)

    def wait(self) -> None:
        """Waits until all are here."""
        with self._together():
            self._accelerator.wait_for_everyone()

    def any(self, mine: bool) -> bool:
        """Whether it is true in any of them."""
        return bool(sum(self._gather(mine)))

    def check_same(self, value: str) -> None:
        """Refuses to continue unless all have the same value.

        Raises:
            DeltaConvError: in all of them, with the first two values that differ.
        """
        for number, other in enumerate(values := self._gather(value)):
            if other != values[0]:
                raise DeltaConvError(
                    f"processes 0 and {number} do not train the same: {values[0]}; {other}. Give all the "
                    "same options, and put --output on a disk that all machines share"
                )

    @torch.no_grad()
    def share(self, tensors: Sequence[Tensor]) -> None:
        """Gives each tensor the values that it has in the first process."""
        from accelerate.utils import broadcast

        if self.count > 1:
            with self._together():
                for tensor in tensors:
                    tensor.copy_(broadcast(tensor.detach()))

    @torch.no_grad()
    def mean(self, tensors: Sequence[Tensor]) -> None:
        """Gives each tensor its mean over all processes."""
        if self.count == 1:
            return
        for portion in _portions(tensors):
            flat = torch.cat([tensor.detach().flatten() for tensor in portion])
            with self._together():
                flat = self._accelerator.reduce(flat, reduction="mean")
            parts = flat.split([tensor.numel() for tensor in portion])
            for tensor, part in zip(portion, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def _gather(self, value: Any) -> list[Any]:
        from accelerate.utils import gather_object

        with self._together():
            gathered: list[Any] = gather_object([value])
        return gathered

    @contextmanager
    def _together(self) -> Iterator[None]:
        """What all processes do at once; it fails when one of them is gone."""
        try:
            yield
        except RuntimeError as error:
            raise DeltaConvError(
                f"process {self.number} of {self.count} has lost another one, which was ended or cannot be "
                f"reached ({error}). What was trained up to the last save is kept: start all processes again "
                "with the same options to resume"
            ) from error


def _portions(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in groups of no more than PORTION numbers; a larger one is a group of its own."""
    portion: list[Tensor] = []
    for tensor in tensors:
        if portion and sum(one.numel() for one in portion) + tensor.numel() > PORTION:
            yield portion
            portion = []
        portion.append(tensor)
    if portion:
        yield portion
