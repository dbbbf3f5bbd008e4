"""Which of several equal formulations is the fastest here: measured once, briefly, and remembered.

Formulations differ in rounding only (about 1e-6 of the result in float32). So that nothing else ever depends
on how busy a machine was, a measurement counts only where it cannot do harm:

- with autograd on (training: a resumed run repeats an unbroken one bit by bit), while torch compiles, with
  `torch.use_deterministic_algorithms`, under a dispatch mode (FLOP counters, fake tensors), on tensors that
  have no values, and with DELTACONV_TUNE=0, the default is taken, which is a constant;
- while a CUDA graph is captured, what was measured before is taken, or else the default;
- otherwise the first call of a kind measures, and its choice holds for the process, and through a file for
  later processes: pictures repeat exactly on one machine. Another machine, or the same one without its file,
  may choose otherwise.

A kind is: device, number of threads on a CPU, torch version, operator, dtype, what the operator adds (kernel
size, channels, ...), and the number of tokens rounded to a power of two and cut off at MOST_TOKENS: above it
a trial runs on the first rows. Every candidate runs LEAST_ROUNDS times (a hopeless one twice) and then, up to
ROUNDS times, as long as the BUDGET lasts; the shortest run counts.

Environment: DELTACONV_TUNE=0 turns measuring off; DELTACONV_TUNE_CACHE names the file, empty for none.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils import _python_dispatch

from ...util.devices import device_name
from ...util.foreign_json import read_json
from ...util.lock import held
from ...util.whole_file import write_text

log = logging.getLogger(__name__)
T = TypeVar("T")

TIME_BUDGET = 0.05  # seconds for one kind, beyond which no round starts after the first LEAST_ROUNDS
LEAST_ROUNDS = 5
ROUNDS = 9
HOPELESS = 3.0  # times the fastest: a candidate slower than this is dropped after two runs
PATIENCE = 5.0  # seconds to wait for another process that writes its choices
MARGIN = 0.95  # the default stays unless another takes at most this share of its time
MOST_TOKENS = {"cpu": 1024}
MOST_TOKENS_ELSEWHERE = 16384
FILE_VERSION = 1  # of the file


class KnownFastest:
    """What this process need not measure."""

    def __init__(self) -> None:
        self.fastest: dict[tuple[object, ...], str] = {}
        """Kind -> name of the candidate that was found to be the fastest."""
        self.fixed: dict[str, str] = {}
        """Operator -> name of the candidate that is taken whatever is fastest."""

    def reset(self) -> None:
        """As in a new process, whose file may still know."""
        self.fastest.clear()
        self.fixed.clear()


known = KnownFastest()


def fastest(
    operator: str,
    candidates: Mapping[str, T],
    default: str,
    like: Tensor,
    details: tuple[object, ...],
    tokens: int,
    trial: Callable[[T], object],
) -> T:
    """The candidate to take.

    Args:
        operator: what the candidates do; names the kind together with `details`.
        candidates: name -> candidate.
        default: name of the one to take where nothing may be measured.
        like: a tensor of the call: gives device and dtype.
        details: what else decides which one is fastest, such as "K", 7.
        tokens: how many positions the call has.
        trial: runs a candidate on tensors like the call's, cut off at `trial_rows`. A candidate that raises
            is out.
    """
    if operator in known.fixed:
        return candidates[known.fixed[operator]]
    if not _may_choose(like):
        return candidates[default]
    rounded = 2 ** round(math.log2(min(tokens, _most_tokens(like.device))))
    kind = (operator, details, rounded, like.dtype, like.device, torch.get_num_threads())
    name = known.fastest.get(kind)
    if name is None and like.is_cuda and torch.cuda.is_current_stream_capturing():
        return candidates[default]
    if name is None:
        sentence = _in_words(*kind)
        name = _from_file(sentence, candidates) or _measured(sentence, candidates, default, like, trial)
        known.fastest[kind] = name
    return candidates[name]


def trial_rows(device: torch.device, grid: tuple[int, int]) -> int:
    """How many rows of a grid a trial runs on."""
    return min(grid[0], max(1, _most_tokens(device) // grid[1]))


@contextmanager
def fixed(**choices: str) -> Iterator[None]:
    """Takes these candidates, operator=name, whatever is fastest: for tests and benchmarks."""
    before, known.fixed = known.fixed, known.fixed | choices
    try:
        yield
    finally:
        known.fixed = before


def synchronize(device: torch.device) -> None:
    """Waits until the device, current or not, has done all that it was given; a CPU has, always."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif wait := getattr(torch.get_device_module(device), "synchronize", None):
        wait()


def cache_file() -> Path | None:
    """Where choices are kept between processes; None: nowhere, as for users without a home folder."""
    try:
        return _cache_file(os.environ.get("DELTACONV_TUNE_CACHE"))
    except RuntimeError:  # of Path.home and expanduser
        return None


def _cache_file(stated: str | None) -> Path | None:
    if stated is not None:
        return Path(stated).expanduser() if stated else None
    if sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "deltaconv" / "fastest.json"


def _may_choose(like: Tensor) -> bool:
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or os.environ.get("DELTACONV_TUNE") == "0"
        or like.device.type == "meta"
        or torch.are_deterministic_algorithms_enabled()
        or _python_dispatch._get_current_dispatch_mode() is not None
    )


def _most_tokens(device: torch.device) -> int:
    return MOST_TOKENS.get(device.type, MOST_TOKENS_ELSEWHERE)


def _in_words(
    operator: str,
    details: tuple[object, ...],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    threads: int,
) -> str:
    """The kind as the file names it."""
    if device.type == "cpu":
        machine = f"{device_name(device)} {torch.backends.cpu.get_cpu_capability()}, {threads} threads"
    else:
        machine = f"{device.type} {device_name(device)}"
    where = f"{machine}, torch {torch.__version__}"
    what = " ".join(map(str, details))
    return f"{where}, {operator}, {str(dtype).removeprefix('torch.')}, {what}, {tokens} tokens"


def _from_file(kind: str, candidates: Mapping[str, T]) -> str | None:
    path = cache_file()
    name = None if path is None else _load(path).get(kind)
    return name if name in candidates else None


def _measured(
    kind: str, candidates: Mapping[str, T], default: str, like: Tensor, trial: Callable[[T], object]
) -> str:
    times = shortest_runs(candidates, like.device, trial)
    best = min(times, key=times.__getitem__, default=default)
    if default in times and times[best] > MARGIN * times[default]:
        best = default
    log.debug("ΔConv: %s: %s, of %s", kind, best, {name: f"{t:.2g} s" for name, t in times.items()})
    _keep(kind, best)
    return best


def shortest_runs(
    candidates: Mapping[str, T], device: torch.device, trial: Callable[[T], object]
) -> dict[str, float]:
    """Name -> shortest run in seconds, by turns; without those that failed."""
    left, times = dict(candidates), dict.fromkeys(candidates, math.inf)
    start = time.perf_counter()
    for turn in range(ROUNDS):
        for name, candidate in list(left.items()):
            try:
                synchronize(device)
                begun = time.perf_counter()
                trial(candidate)
                synchronize(device)
            except RuntimeError as error:
                log.debug("ΔConv: %s cannot run here: %s", name, error)
                del left[name]
                continue
            times[name] = min(times[name], time.perf_counter() - begun)
        if turn:  # a first run may have compiled something
            left = {name: c for name, c in left.items() if times[name] <= HOPELESS * min(times.values())}
        if turn + 1 >= LEAST_ROUNDS and time.perf_counter() - start > TIME_BUDGET:
            break
    return {name: times[name] for name in left}


def _load(path: Path) -> dict[str, str]:
    try:
        content = read_json(path)
        if content["version"] != FILE_VERSION:
            return {}
        return {str(kind): str(name) for kind, name in content["choices"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("ΔConv: %s cannot be used (%s), so what is fastest is measured again", path, error)
        return {}


def _keep(kind: str, name: str) -> None:
    """Adds a choice to the file, whole or not at all; what other processes added meanwhile stays."""
    path = cache_file()
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with held(path.with_name(f".{path.name}.lock"), PATIENCE):
            content = {"version": FILE_VERSION, "choices": {**_load(path), kind: name}}
            write_text(path, json.dumps(content, indent=1))
    except OSError as error:
        log.warning("ΔConv: cannot write %s (%s); what is fastest is measured again next time", path, error)
