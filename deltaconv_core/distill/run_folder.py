"""The folder of one distillation run: everything that resuming needs, safe from a kill at any moment.

`state.safetensors` holds the weights, their average, the optimizer's state, and in its header the step, the
settings and the blocks' specs; it is replaced as a whole. Noise, timesteps, order of the data and dropped
captions are made from the seed and the number of a batch, so the step is the position in all of them.
`log.csv` has a row for every step; rows after the saved step are dropped when the run resumes.
Its column `stage` is what the program calls the phase.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, DeltaConvError
from ..util.foreign_json import parse_json
from ..util.lock import held, holder
from ..util.text import quoted
from ..util.whole_file import replacing
from ..weights.safefile import Pathlike, read_file, read_header, write_file

COLUMNS = ("step", "stage", "learning_rate", "feature", "teacher", "noise", "gradient_norm")
RUN_KEY = "deltaconv_run"
RUN_FORMAT = 1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One step of the log; the losses that its phase has."""

    step: int
    phase: str
    learning_rate: float
    losses: dict[str, float]
    gradient_norm: float

    @property
    def loss(self) -> float:
        """What stands for the step in a plot: the loss against the teacher, else the feature loss."""
        return self.losses.get("teacher", self.losses["feature"])


@dataclass
class State:
    """Where a run stands after `step` optimizer steps."""

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def learned(self) -> dict[str, Tensor]:
        """Copies of the weights that are the result: their average, or the last where none is kept."""
        return self._part("average") or self._part("weights")

    def _part(self, name: str) -> dict[str, Tensor]:
        named = {key.partition("."): tensor for key, tensor in self.tensors.items()}
        return {rest: tensor.detach().clone() for (part, _, rest), tensor in named.items() if part == name}


class RunFolder:
    """A run's files.

    Args:
        path: made when something is saved.
        writes: whether this process keeps the run; where several train together, the others only read it.
        on_save: called with every state once it is saved, by the process that writes.
    """

    def __init__(
        self, path: Pathlike, writes: bool = True, on_save: Callable[[State], None] | None = None
    ) -> None:
        self.path = Path(path)
        self.writes = writes
        self.on_save = on_save
        self.state_file = self.path / "state.safetensors"
        self.log_file = self.path / "log.csv"

    @property
    def exists(self) -> bool:
        """Whether there is a state to resume from."""
        return self.state_file.is_file()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, no other process trains this run; one that only reads takes no part in this.

        Raises:
            DeltaConvError: one does, or the folder cannot be made.
        """
        if not self.writes:
            yield
            return
        new = not self.path.exists()
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
        lock = self.path / ".lock"
        try:
            with ExitStack() as stack:
                try:
                    stack.enter_context(held(lock, 0))
                except TimeoutError:
                    raise DeltaConvError(
                        f"the run in {self.path} is being trained by {holder(lock) or 'another process'}; "
                        "wait until it ends, or start a new run"
                    ) from None
                except OSError as error:
                    log.debug("ΔConv: no lock for %s (%s)", self.path, error)
                yield
        finally:
            if new:
                with suppress(OSError):
                    self.path.rmdir()  # nothing was saved

    def take_over(self, other: RunFolder) -> None:
        """Copies another run's state and log.

        Raises:
            DeltaConvError: they cannot be copied.
        """
        with self._writing():
            for own, theirs in ((self.log_file, other.log_file), (self.state_file, other.state_file)):
                if theirs.is_file():
                    with replacing(own, durable=True) as part:
                        shutil.copyfile(theirs, part)

    def summary(self) -> State:
        """The saved state without its tensors.

        Raises:
            CheckpointError: no state there, or a damaged one.
        """
        return self._parsed(read_header(self.state_file))

    def save(self, state: State, rows: list[Row]) -> None:
        """Writes the state, and adds the rows to the log.

        Raises:
            DeltaConvError: the folder cannot be written.
        """
        if not self.writes:
            return
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            _append(self.log_file, rows)
        header = {"format": RUN_FORMAT, "step": state.step, **state.values}
        write_file(self.state_file, state.tensors, {RUN_KEY: json.dumps(header)}, numbers=True)
        if self.on_save is not None:
            self.on_save(state)

    def values(self) -> dict[str, Any]:
        """The plain values of the saved state, without its tensors.

        Raises:
            CheckpointError: no state there, or a damaged one.
        """
        return self._parsed(read_header(self.state_file)).values

    def load(self) -> tuple[State, list[Row]]:
        """The saved state and the log up to it, whose later rows are removed; no log if only reading.

        Raises:
            CheckpointError: no state there, or a damaged one.
            DeltaConvError: the log cannot be written.
        """
        state = self.state()
        return state, self._cut_log(state.step) if self.writes else []

    def state(self) -> State:
        """The saved state, without its log.

        Raises:
            CheckpointError: no state there, or a damaged one.
        """
        header, tensors = read_file(self.state_file, numbers=True)
        state = self._parsed(header)
        state.tensors = tensors
        return state

    def _parsed(self, header: Mapping[str, str]) -> State:
        """A state without its tensors."""
        try:
            values = parse_json(header[RUN_KEY])
            step, version = values.pop("step"), values.pop("format")
            if type(step) is not int or step < 0:
                raise ValueError(f"its step is {quoted(step)}")
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self.state_file} is not the state of a distillation run ({error}); choose another run, or "
                "start a new one"
            ) from error
        if version != RUN_FORMAT:
            raise CheckpointError(
                f"{self.state_file} has format version {quoted(version)}, this program reads {RUN_FORMAT}; "
                "resume with the version of ComfyUI-DeltaConv that wrote it"
            )
        return State(step, {}, values)

    def read_log(self) -> list[Row]:
        """The log's whole rows, the last of each step: a save that failed may have left some behind.

        The log is for plots, and the state alone decides how a run resumes. So rows that cannot be read are
        left out, such as those of a spreadsheet that saved the file in its own way; how many is logged.
        """
        try:
            text = self.log_file.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        except OSError as error:
            log.warning("%s cannot be read (%s); the run resumes without it", self.log_file, error)
            return []
        lines = [line for line in text.splitlines() if line]
        rows = [_read_row(line) for line in lines if line != ",".join(COLUMNS)]
        if lost := rows.count(None):
            log.warning("%d of %d rows of %s cannot be read and are left out", lost, len(rows), self.log_file)
        return list({row.step: row for row in rows if row is not None}.values())

    def _cut_log(self, step: int) -> list[Row]:
        rows = [row for row in self.read_log() if row.step <= step]
        with self._writing(), replacing(self.log_file) as part:
            _append(part, rows)
        return rows

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Whatever is wrong with the values of a state that was read is one error that names its file."""
        try:
            yield
        except (DeltaConvError, torch.cuda.OutOfMemoryError):
            raise
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.state_file} is not a whole state of a distillation run ({type(error).__name__}: "
                f"{error}); start a new run, or put back a copy of it"
            ) from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DeltaConvError(
                f"cannot write the run folder {self.path} ({error}); free some space or choose another folder"
            ) from error


def _append(path: Path, rows: list[Row]) -> None:
    last = _last_byte(path)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if last not in b"\n":  # a row that a full disk has torn
            file.write("\r\n")
        if not last:
            writer.writerow(COLUMNS)
        for row in rows:
            losses = [row.losses.get(name, "") for name in ("feature", "teacher", "noise")]
            writer.writerow([row.step, row.phase, row.learning_rate, *losses, row.gradient_norm])


def _last_byte(path: Path) -> bytes:
    """Empty if there is none."""
    if not path.is_file() or not path.stat().st_size:
        return b""
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read()


def _read_row(line: str) -> Row | None:
    """One line of the log; None: it cannot be read."""
    try:
        line.encode("ascii")  # no letter of a row is any other
        (cells,) = csv.reader([line])
        row = dict(zip(COLUMNS, cells, strict=True))
        losses = {name: float(row[name]) for name in ("feature", "teacher", "noise") if row[name]}
        rate, norm = float(row["learning_rate"]), float(row["gradient_norm"])
        read = Row(int(row["step"]), row["stage"], rate, losses, norm)
        return read if {"feature", "teacher"} & losses.keys() else None
    except (ValueError, KeyError, csv.Error):
        return None


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors and plain values, both named `<parameter number>.<name>`.

    Read off the optimizer itself: bitsandbytes gives out another form in `state_dict` than it takes back.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        for name, value in optimizer.state.get(parameter, {}).items():
            (tensors if isinstance(value, Tensor) else values)[f"{number}.{name}"] = value
    return tensors, values


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Gives an optimizer the state that `pack_optimizer` took.

    Raises:
        ValueError: it is not of these parameters; nothing was changed.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**values, **tensors}.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    for index, own in state.items():
        if not 0 <= index < len(parameters):
            raise ValueError(f"a state of parameter {index}, of {len(parameters)} in the optimizer")
        if isinstance(optimizer, torch.optim.AdamW):
            _check_moments(index, own, parameters[index])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _check_moments(index: int, state: Mapping[str, Any], parameter: Tensor) -> None:
    """AdamW's: the number of steps, and two tensors like the parameter."""
    for name, shape in (("step", ()), ("exp_avg", parameter.shape), ("exp_avg_sq", parameter.shape)):
        value = state.get(name)
        if not isinstance(value, Tensor) or value.shape != shape or not value.is_floating_point():
            what = tuple(value.shape) if isinstance(value, Tensor) else value
            raise ValueError(f"the optimizer's {name} of parameter {index} is {what}")
