"""The command; see the package."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from benchmarks import fuzz
from benchmarks.fuzz.kinds import KINDS
from benchmarks.fuzz.watch import Watch
from benchmarks.harness import circumstances, parser
from deltaconv_core.errors import LONGEST_MESSAGE, DeltaConvError
from deltaconv_core.util.text import markdown

SLOW = 10.0  # seconds of one input
MOST_MEMORY = 400  # MB above the start


@dataclass
class Tally:
    """What became of the inputs of one kind."""

    tried: int = 0
    taken: int = 0
    refused: int = 0
    unexpected: dict[str, list[int]] = field(default_factory=dict)
    """What happened -> numbers of the inputs."""
    slowest: float = 0.0

    def note(self, number: int, what: str) -> None:
        """Something unexpected."""
        self.unexpected.setdefault(what, []).append(number)


def main(arguments: list[str] | None = None) -> int:
    """Tries the inputs, prints a table; the exit status is 1 if anything was unexpected."""
    command = parser(fuzz.__doc__)
    command.add_argument("--inputs", type=int, default=100_000, help="of all kinds together (%(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of all of them (%(default)s)")
    command.add_argument("--kinds", default=",".join(KINDS), help="comma list (%(default)s)")
    command.add_argument("--only", metavar="KIND/NUMBER", help="one input, whose traceback is printed")
    options = command.parse_args(arguments)
    start = peak()
    with quiet():
        tallies = run_all(options)
    memory = peak() - start
    print("\n".join(markdown([row(kind, tally) for kind, tally in tallies.items()])))
    print(f"\nHighest resident memory above that of the start: {memory:.0f} MB (limit {MOST_MEMORY}).")
    print(json.dumps(circumstances()))
    for kind, tally in tallies.items():
        for what, numbers in tally.unexpected.items():
            print(f"\nunexpected: {len(numbers)} x {what}\ntry {kind}/{numbers[0]}", file=sys.stderr)
    return int(any(tally.unexpected for tally in tallies.values()) or memory > MOST_MEMORY)


def run_all(options: argparse.Namespace) -> dict[str, Tally]:
    """Tries what the options say, by kind."""
    if options.only:
        kind, _, number = options.only.partition("/")
        return {kind: run(kind, [int(number)], options.seed)}
    kinds = options.kinds.split(",")
    return {
        kind: run(kind, range(place, options.inputs, len(kinds)), options.seed)
        for place, kind in enumerate(kinds)
    }


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing is logged; there are warnings about many inputs."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def run(kind: str, numbers: range | list[int], seed: int) -> Tally:
    """Tries inputs of one kind."""
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="deltaconv-fuzz-") as place:
        folder = Path(place) / "inside"
        for number in numbers:
            folder.mkdir()
            tally.tried += 1
            try_one(kind, number, seed, folder, tally, single=len(numbers) == 1)
            shutil.rmtree(folder)
            if other := list(Path(place).iterdir()):
                tally.note(number, f"left {other} beside its folder")
                break
    return tally


def try_one(kind: str, number: int, seed: int, folder: Path, tally: Tally, single: bool = False) -> None:
    """Makes one input, and counts what becomes of it."""
    random = Random(f"{seed}/{kind}/{number}")
    start = time.perf_counter()
    with WATCH.over(folder) as seen:
        try:
            KINDS[kind](random, folder)
            tally.taken += 1
        except DeltaConvError as error:
            tally.refused += 1
            if len(str(error)) > LONGEST_MESSAGE:
                tally.note(number, f"a message of more than {LONGEST_MESSAGE} characters")
        except Exception as error:
            tally.note(number, f"{type(error).__name__} in {_where(error)}")
            if single:
                traceback.print_exc()
    seconds = time.perf_counter() - start
    tally.slowest = max(tally.slowest, seconds)
    if seconds > SLOW:
        tally.note(number, f"more than {SLOW:.0f} s")
    for what in seen:
        tally.note(number, what)


def _where(error: Exception) -> str:
    """The places in this repository that an error came through last."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename
    ]
    return " < ".join(f"{Path(frame.filename).name}:{frame.name}" for frame in reversed(frames[-3:]))


def row(kind: str, tally: Tally) -> dict[str, str]:
    """A row of the table."""
    return {
        "kind": kind,
        "inputs": f"{tally.tried:,}",
        "taken": f"{tally.taken:,}",
        "refused": f"{tally.refused:,}",
        "unexpected": str(sum(map(len, tally.unexpected.values()))),
        "slowest (s)": f"{tally.slowest:.2f}",
    }


def peak() -> float:
    """Highest resident memory of this process so far, in MB."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


WATCH = Watch()

if __name__ == "__main__":
    sys.exit(main())
