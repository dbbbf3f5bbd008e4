"""The loop: takes batches, has the phase's task send losses backward, steps, averages, saves."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import DeltaConvError
from ..util.devices import SHORT_DTYPES
from ..util.text import quoted
from .optimizer import Average, make_optimizer
from .processes import Processes
from .run_folder import Row, RunFolder, State, pack_optimizer, unpack_optimizer
from .settings import LAYER_WISE, Settings
from .taps import Taps, tapped
from .task import Batch, EndToEnd, LayerWise, Network

log = logging.getLogger(__name__)

MAY_CHANGE = ("layer_steps", "output_steps", "save_every", "checkpointing")
"""Settings that may have other values when a run is resumed."""
MAX_SKIPPED = 20
"""Steps in a row that loss scaling may skip in float16."""


@dataclass
class Result:
    """What became of a run.

    Args:
        step: optimizer steps done, in all sessions of the run.
        rows: the log of all of them.
        stopped: why it ended early; empty when it did not.
    """

    step: int
    rows: list[Row]
    stopped: str = ""


class Diverged(Exception):
    """A loss or a gradient is not a finite number."""


def distill(
    network: Network,
    mixers: Mapping[str, nn.Module],
    batches: Callable[[int], Batch],
    settings: Settings,
    folder: RunFolder | None = None,
    on_step: Callable[[Row], None] | None = None,
    notes: Mapping[str, str] | None = None,
    processes: Processes | None = None,
    tapping: AbstractContextManager[Taps] | None = None,
) -> Result:
    """Trains the mixers to stand in for the network's attention.

    Afterwards the mixers hold the averaged weights. Whatever stops the run, an exception of `on_step` (a
    user's cancel) included, the state of the last whole step is saved first. A run that finds a state in
    its folder resumes from it, bit by bit as if it had never stopped (on the same device and library).

    Where a loss or gradient is not a finite number, the run ends with its last saved state, if there is one:
    a state is saved only when the step after it was sound, or when the run ends for another reason.

    Where several processes train together, each gives `batches` of its own with the same number of samples,
    and a step is what it would be with all of them in one batch.

    Args:
        network: the host's; frozen.
        mixers: site id -> mixer with float32 weights on the network's device, already started
            (`warm_start`); sites without one keep their attention.
        batches: gives the batch of a number, always the same one; step n takes numbers n * accumulation and
            following.
        settings: how to train.
        folder: where the state is kept; None keeps none.
        on_step: called after every step.
        notes: kept with the state, and equal whenever the run is resumed: what the mixers and data are.
        processes: those that train together, if there are several.
        tapping: puts the mixers beside the network's attentions for the time of the training; None: `tapped`.

    Raises:
        DeltaConvError: a saved run with other settings, notes or mixers, one that another process trains, or
            processes that do not train the same.
    """
    in_use = nullcontext() if folder is None else folder.in_use()
    if tapping is None:
        tapping = tapped(network.attentions, mixers, network.grids)
    with in_use, tapping as taps:
        tasks = LayerWise(network, taps), EndToEnd(network, taps, settings)
        trainer = _Trainer(mixers, settings, dict(notes or {}), processes)
        if folder is not None and folder.exists:
            trainer.restore(folder)
        trainer.meet()
        try:
            while trainer.step < settings.steps:
                task = tasks[0] if settings.phase(trainer.step) == LAYER_WISE else tasks[1]
                row = trainer.take_step(task, batches, folder)
                if on_step is not None:
                    on_step(row)
        except Diverged as error:
            if folder is not None and trainer.saved:
                trainer.restore(folder)
            trainer.stopped = (
                f"{error}; the weights of step {trainer.step} are kept. Start a new run with a smaller "
                "learning_rate"
            )
            log.warning("ΔConv distillation stopped: %s", trainer.stopped)
        finally:
            if folder is not None and trainer.whole:
                trainer.save(folder)
        trainer.average.hand_over()
    return Result(trainer.step, trainer.rows, trainer.stopped)


def check_same_run(folder: RunFolder, settings: Settings, notes: Mapping[str, str]) -> None:
    """Refuses a folder whose run was started with other settings or notes; an empty one is accepted.

    `distill` checks again with all notes. A host checks what it knows before it prepares the data.

    Raises:
        DeltaConvError: with all that differs.
        CheckpointError: the saved state is damaged.
    """
    if not folder.exists:
        return
    saved = folder.values()
    free = {name: getattr(settings, name) for name in MAY_CHANGE}
    with folder.reading():
        then = replace(Settings.from_dict(saved["settings"]), **free).to_dict() | saved["notes"]
    now = settings.to_dict() | dict(notes)
    other = [
        f"{name} {quoted(then.get(name))}, now {quoted(now[name])}"
        for name in now
        if then.get(name) != now[name]
    ]
    if other:
        raise DeltaConvError(
            f"the run in {folder.path} was started with {'; '.join(other)}: resume with the same, or start a "
            "new run"
        )


def is_finished(folder: RunFolder, settings: Settings, notes: Mapping[str, str]) -> bool:
    """Whether a run was trained to its end with just these settings and notes; a damaged one was not.

    The whole state is read: whoever takes the run over could not go on with a damaged one.
    """
    try:
        check_same_run(folder, settings, notes)
        state = folder.state()
        with folder.reading():
            phases = tuple(state.values["settings"][name] for name in ("layer_steps", "output_steps"))
    except DeltaConvError:
        return False
    return phases == (settings.layer_steps, settings.output_steps) and state.step == settings.steps


class _Trainer:
    """Everything that changes from step to step."""

    def __init__(
        self,
        mixers: Mapping[str, nn.Module],
        settings: Settings,
        notes: dict[str, str],
        processes: Processes | None,
    ) -> None:
        self.settings = settings
        self.notes = notes
        self.processes = processes
        self.weights: dict[str, Tensor] = {
            f"{site}.{name}": parameter
            for site, mixer in mixers.items()
            for name, parameter in mixer.named_parameters()
            if parameter.requires_grad
        }
        if not self.weights:
            raise DeltaConvError("there is no mixer to train: choose at least one site")
        self.device = next(iter(self.weights.values())).device
        self.optimizer = make_optimizer(self.weights.values(), settings)
        self.average = Average(self.weights, settings.ema)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self.step = 0
        self.skipped = 0
        self.rows: list[Row] = []
        self.saved = 0
        self.whole = True
        self.stopped = ""

    def meet(self) -> None:
        """Checks that all processes are at the same step of the same run, and starts them all alike."""
        if self.processes is not None:
            self.processes.check_same(f"step {self.step} of {self.settings.to_dict()} with {self.notes}")
            self.processes.share([*self.weights.values(), *self.average.values.values()])

    def take_step(
        self, task: LayerWise | EndToEnd, batches: Callable[[int], Batch], folder: RunFolder | None
    ) -> Row:
        """One optimizer step; before it, what is due is saved, once this batch has shown it to be sound.

        Raises:
            Diverged: before anything was changed.
        """
        count = self.settings.accumulation
        dtype = SHORT_DTYPES[self.settings.precision]
        totals: dict[str, Tensor] = {}
        self.optimizer.zero_grad(set_to_none=True)
        for number in range(self.step * count, (self.step + 1) * count):
            with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                losses = task(batches(number), self._backward)
            for name, value in losses.items():
                totals[name] = totals.get(name, torch.zeros_like(value)) + value / count
        if self.processes is not None:
            self.processes.mean([w.grad for w in self.weights.values() if w.grad is not None])
            self.processes.mean(list(totals.values()))
        self.scaler.unscale_(self.optimizer)
        clip = self.settings.clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.weights.values(), clip))
        row = self._row({name: float(value) for name, value in totals.items()}, norm)
        self._check(row)
        if folder is not None and not self.skipped and self.step - self.saved >= self.settings.save_every:
            self.save(folder)
        self._update(row)
        return row

    def _backward(self, loss: Tensor) -> None:
        with torch.autocast(self.device.type, enabled=False):  # backward is as forward was
            self.scaler.scale(loss / self.settings.accumulation).backward()  # type: ignore[no-untyped-call]

    def _row(self, losses: dict[str, float], norm: float) -> Row:
        phase, rate = self.settings.phase(self.step), self.settings.rate(self.step)
        return Row(self.step + 1, phase, rate, losses, norm)

    def _check(self, row: Row) -> None:
        values = {**row.losses, "gradient norm": row.gradient_norm}
        bad = {name: value for name, value in values.items() if not math.isfinite(value)}
        self.skipped = self.skipped + 1 if bad else 0
        if bad and (not self.scaler.is_enabled() or self.skipped > MAX_SKIPPED):
            raise Diverged(f"step {row.step} ({row.phase}) has {bad}")

    def _update(self, row: Row) -> None:
        """Nothing in here may be saved half done."""
        self.whole = False
        for group in self.optimizer.param_groups:
            group["lr"] = row.learning_rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.average.update(self.step)
        self.step += 1
        self.rows.append(row)
        self.whole = True

    def save(self, folder: RunFolder) -> None:
        """Saves the state, unless it is saved already."""
        if self.saved == self.step:
            return
        optimizer, values = pack_optimizer(self.optimizer)
        tensors = {f"weights.{name}": weight for name, weight in self.weights.items()}
        tensors |= {f"average.{name}": value for name, value in self.average.values.items()}
        tensors |= {f"optimizer.{name}": value for name, value in optimizer.items()}
        described = {
            "settings": self.settings.to_dict(),
            "notes": self.notes,
            "optimizer": values,
            "scaler": self.scaler.state_dict(),
        }
        new = [row for row in self.rows if row.step > self.saved]
        folder.save(State(self.step, tensors, described), new)
        self.saved = self.step

    @torch.no_grad()
    def restore(self, folder: RunFolder) -> None:
        """Returns to the saved state.

        Raises:
            DeltaConvError: it belongs to other settings, notes or mixers.
        """
        check_same_run(folder, self.settings, self.notes)
        state, rows = folder.load()
        with folder.reading():
            self._take(folder, state)
        self.step = self.saved = state.step
        self.rows = rows

    def _take(self, folder: RunFolder, state: State) -> None:
        """Takes over weights, average, optimizer and scaler."""
        parts: dict[str, dict[str, Tensor]] = {"weights": {}, "average": {}, "optimizer": {}}
        for name, tensor in state.tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        shapes = {name: tuple(weight.shape) for name, weight in self.weights.items()}
        saved = {name: tuple(tensor.shape) for name, tensor in parts["weights"].items()}
        if shapes != saved:
            other = sorted(
                name for name in shapes.keys() | saved.keys() if shapes.get(name) != saved.get(name)
            )
            raise DeltaConvError(
                f"the run in {folder.path} has other blocks, first {other[0]}: "
                f"{saved.get(other[0], 'none')}, now {shapes.get(other[0], 'none')}; choose the same kernel "
                "sizes and sites, or start a new run"
            )
        scaler = state.values["scaler"]
        if any(not isinstance(value, (int, float)) for value in scaler.values()):
            raise ValueError(f"loss scaling of {scaler!r}")
        unpack_optimizer(self.optimizer, parts["optimizer"], state.values["optimizer"])
        for name, weight in self.weights.items():
            weight.copy_(parts["weights"][name])
        for name, value in self.average.values.items():
            value.copy_(parts["average"][name])
        self.scaler.load_state_dict(scaler)
