"""What a user sees of a run, and how a user stops it."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from ...distill import Row
from ...errors import DeltaConvError
from .accelerated import AcceleratedProcesses

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME = 2.0
"""Seconds within which signals count as one."""


class Stopped(Exception):
    """The user wants the run to end now, and perhaps to resume it later."""


class Stop:
    """Waits for Ctrl+C or a request to end, so that the step that is being made can be finished and saved.

    Another one ends the process at once, unless it comes right after: launchers pass on what the terminal
    has sent already.
    """

    def __init__(self) -> None:
        self.asked = False
        self.since = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the first signal is only remembered."""
        before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self.since = True, now
        elif now - self.since > SAME:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


class ProgressBar:
    """The bar of the training, its curves, and the question whether to stop; called after every step.

    Args:
        processes: only the first one shows anything.
        steps: of the whole run.
        stop: asked after every step, in all processes.
        curves: folder for TensorBoard; None writes none.

    Raises:
        DeltaConvError: curves are wanted, and tensorboard is not installed.
    """

    def __init__(self, processes: AcceleratedProcesses, steps: int, stop: Stop, curves: Path | None) -> None:
        self.processes = processes
        self.steps = steps
        self.stop = stop
        self.curves = curves if processes.is_main else None
        self.bar: Any = None
        self.writer: Any = None
        if self.curves is not None:
            _writers()

    def __call__(self, row: Row) -> None:
        if self.bar is None:
            self._begin(row.step - 1)
        losses = {name: f"{value:.4g}" for name, value in row.losses.items()}
        self.bar.set_postfix({"phase": row.phase, **losses}, refresh=False)
        self.bar.update(1)
        if self.writer is not None:
            for name, value in {**row.losses, "gradient_norm": row.gradient_norm}.items():
                self.writer.add_scalar(f"{row.phase}/{name}", value, row.step)
            self.writer.add_scalar("learning_rate", row.learning_rate, row.step)
        if self.processes.any(self.stop.asked):
            raise Stopped

    def _begin(self, done: int) -> None:
        self.bar = _bar(self.processes, total=self.steps, initial=done, desc="steps", unit="step")
        if self.curves is not None:
            self.writer = _writers()(str(self.curves), purge_step=done + 1)

    def close(self) -> None:
        """Ends the bar's line and the curves' file."""
        for part in (self.bar, self.writer):
            if part is not None:
                part.close()


def through(processes: AcceleratedProcesses) -> Any:
    """A function that goes through items with a bar, for `samples.encode_samples`."""

    def go(items: Sequence[Any], what: str) -> Iterable[Any]:
        bar: Iterable[Any] = _bar(processes, iterable=items, desc=f"encoding {what}")
        return bar

    return go


def _bar(processes: AcceleratedProcesses, **options: Any) -> Any:
    from tqdm.auto import tqdm

    return tqdm(disable=not processes.is_main, dynamic_ncols=True, **options)


def _writers() -> Any:
    """The class of TensorBoard's writer."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise DeltaConvError(
            f"--tensorboard needs the package tensorboard ({error}): pip install tensorboard, or leave it out"
        ) from error
    return SummaryWriter
