"""How long a device works on something."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch

from ..block.ops.fastest import synchronize

FLUSHED = 2**28  # bytes written before a run on a GPU, more than any of its caches holds
CYCLES = 2e9  # of a GPU's clock in a second, about
AHEAD = 0.0025, 0.1  # seconds, at least and at most, for which it is busy while the host queues what is timed


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
        event.record(torch.cuda.current_stream(self.device))
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
    queued = dict.fromkeys(runs, 0.0)  # seconds that the host needed in the turn before
    for _ in range(repeats + 1):
        for name, run in runs.items():
            check()
            _prepare(device, 2 * queued[name])
            begun = time.perf_counter()
            with Span(device) as span:
                run()
            queued[name] = time.perf_counter() - begun
            spans[name].append(span)
    return {name: [span.seconds for span in taken[1:]] for name, taken in spans.items()}


def _prepare(device: torch.device, ahead: float) -> None:
    """Empties a GPU's caches and keeps it busy for some seconds, within the limits of AHEAD."""
    if device.type == "cuda":
        least, most = AHEAD
        torch.empty(FLUSHED, dtype=torch.int8, device=device).zero_()
        with torch.cuda.device(device):
            torch.cuda._sleep(int(CYCLES * min(max(ahead, least), most)))  # type: ignore[no-untyped-call]
