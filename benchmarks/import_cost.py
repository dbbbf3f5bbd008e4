"""How long the library and its command line take to start, beside PyTorch alone.

    python -m benchmarks.import_cost [--repeats 7]

Prints, for each program, the median time of a whole process, that time as a multiple of `import torch`, and
the seconds beyond it. Programs take turns, so that whatever else slows the machine slows all of them; the
first turn, in which Python may compile modules, is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from deltaconv_core.cli import COMMANDS
from deltaconv_core.util.text import markdown

REPOSITORY = Path(__file__).parents[1]
TORCH = "import torch"
COMMAND = "python -m deltaconv_core"
LISTING = "fetch --list"  # the one command that neither reads a checkpoint nor computes


def main() -> int:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7, help="counted runs of each (%(default)s)")
    print("\n".join(table(measure(programs(), parser.parse_args().repeats))))
    return 0


def programs() -> dict[str, list[str]]:
    """Name -> Python's arguments."""
    imports = [TORCH, "import deltaconv_core"]
    commands = ["--help", *(f"{command} --help" for command in COMMANDS), LISTING]
    return {code: ["-c", code] for code in imports} | {
        f"{COMMAND} {arguments}": ["-m", "deltaconv_core", *arguments.split()] for arguments in commands
    }


def measure(started: Mapping[str, Sequence[str]], repeats: int) -> dict[str, float]:
    """Name -> median seconds of a whole process."""
    taken: dict[str, list[float]] = {name: [] for name in started}
    for _ in range(repeats + 1):
        for name, arguments in started.items():
            begun = time.perf_counter()
            subprocess.run(
                [sys.executable, *arguments], cwd=REPOSITORY, stdout=subprocess.DEVNULL, check=True
            )
            taken[name].append(time.perf_counter() - begun)
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def table(seconds: Mapping[str, float]) -> list[str]:
    """The lines of the table."""
    torch = seconds[TORCH]
    return markdown(
        [
            {
                "program": name,
                "seconds": f"{taken:.2f}",
                "times import torch": f"{taken / torch:.2f}",
                "beyond it, s": f"{taken - torch:+.2f}",
            }
            for name, taken in seconds.items()
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
