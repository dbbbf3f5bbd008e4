"""How long a device works on something."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch

FLUSHED = 2**28  # bytes written before a run on a GPU, more than any of its caches holds
AHEAD = 5_000_000  # clock cycles for which a GPU is kept busy while the host queues what is timed


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all that it was given; a CPU has, always."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


class Span:
    """The time between two points of a device's work.

    On CUDA and ROCm the device itself takes the times and nothing waits for it until they are read; other
    devices are waited for at both ends.

    Example:
        >>> with Span(torch.device("cpu")) as span:
        ...     _ = torch.ones(8).sum()
        >>> span.seconds > 0
        True
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[Any] = []

    def __enter__(self) -> Span:
        self._marks = [self._mark()]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._marks.append(self._mark())

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            synchronize(self.device)
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    @property
    def seconds(self) -> float:
        start, end = self._marks
        if self.device.type != "cuda":
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


def alternate(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    check: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of several runs that take turns, so that whatever else slows the machine slows all of them.

    The first turn is not counted: memory is taken, kernels are compiled and chosen there. On CUDA the caches
    are cold and the queue is filled before each run, so that the device's time is taken and not the host's.

    Args:
        runs: name -> what is timed; what it returns is dropped.
        device: that works on it.
        repeats: counted turns.
        check: called before each run; raises to stop.

    Returns:
        Name -> `repeats` times in seconds.
    """
    spans: dict[str, list[Span]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            check()
            _prepare(device)
            with Span(device) as span:
                run()
            spans[name].append(span)
    return {name: [span.seconds for span in taken[1:]] for name, taken in spans.items()}


def _prepare(device: torch.device) -> None:
    if device.type == "cuda":
        torch.empty(FLUSHED, dtype=torch.int8, device=device).zero_()
        torch.cuda._sleep(AHEAD)  # type: ignore[no-untyped-call]
