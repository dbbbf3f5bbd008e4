"""What the benchmarks share: where figures were taken, peak memory, and the file that rows go to."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from deltaconv_core import bench
from deltaconv_core.util.whole_file import write_text

RESULTS = Path(__file__).parent / "results"


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A command's parser, whose help is the head of its file."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_machine(command: argparse.ArgumentParser, repeats: int) -> None:
    """The options of every command that takes times."""
    command.add_argument("--device", help="such as cuda or cpu (default: cuda where there is one)")
    command.add_argument("--dtype", choices=bench.DTYPES, help="default: float32 on a CPU, else float16")
    command.add_argument("--repeats", type=int, default=repeats, help="timed runs of each (%(default)s)")
    command.add_argument("--small", action="store_true", help="tiny sizes, to see that it works")
    command.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write each row there; rows that are there are not done again",
    )


def circumstances(
    device: torch.device | None = None, dtype: torch.dtype = torch.float32, small: bool = False
) -> dict[str, Any]:
    """Where figures were taken; with ComfyUI's version where it is loaded."""
    described = bench.describe(device or torch.device("cpu"))
    if "comfyui_version" in sys.modules:
        described["comfyui"] = import_module("comfyui_version").__version__
    return described | {"dtype": str(dtype).removeprefix("torch."), "small": small}


def slug(name: str) -> str:
    """A device's name for a file: "Intel(R) Xeon(R) Processor" is "intel_xeon"."""
    plain = re.sub(r"\((R|TM)\)|\b(CPU|Processor|\d+-Core)\b|@.*", " ", name)
    return re.sub(r"[^a-z0-9]+", "_", plain.lower()).strip("_")


def result_file(folder: Path, kind: str, device: torch.device, dtype: torch.dtype) -> Path:
    """Where a machine's figures go; all kinds that begin with the same word share a file."""
    name = str(dtype).removeprefix("torch.")
    return folder / f"{kind.split()[0]}_{slug(bench.device_name(device))}_{name}.json"


class Results:
    """Rows in a JSON file, which is written again with every row, so that nothing is lost and done twice.

    Args:
        path: of the file; None keeps the rows here alone.
        described: where the figures are taken. A file of other circumstances ends the program.
    """

    def __init__(self, path: Path | None, described: dict[str, Any]) -> None:
        self.path = path
        self.described = json.loads(json.dumps(described))
        self.rows: list[dict[str, Any]] = []
        if path is not None and path.exists():
            known = json.loads(path.read_text(encoding="utf-8"))
            self.rows = known.pop("rows")
            if known != self.described:
                raise SystemExit(
                    f"{path} holds figures taken under other circumstances:\n  {known}\nnow:\n  "
                    f"{self.described}\nName another file, or delete it."
                )

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The row with these values, if there is one."""
        wanted = json.loads(json.dumps(key))
        return next((row for row in self.rows if wanted.items() <= row.items()), None)

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Keeps a row, and writes the file."""
        self.rows.append(json.loads(json.dumps(row)))
        if self.path is not None:
            text = json.dumps(self.described | {"rows": self.rows}, indent=1) + "\n"
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, text)
        return self.rows[-1]


def reason(error: RuntimeError) -> str:
    """Why something did not run, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def peak(run: Callable[[], object], device: torch.device) -> int | None:
    """The most bytes in use while something runs, above those before; None where nobody tells.

    On a CPU these are those of the process, so on Linux only.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    if device.type != "cpu" or not Path("/proc/self/clear_refs").exists():
        return None
    trim()
    before = resident()
    return highest(run) - before


def available(device: torch.device) -> int:
    """Bytes that can still be had."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return status("MemAvailable", Path("/proc/meminfo"))


def resident() -> int:
    """Bytes that the process holds now."""
    return status("VmRSS")


def highest(run: Callable[[], object]) -> int:
    """The most bytes that the process held while something ran."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest value so far
    run()
    return status("VmHWM")


def status(name: str, file: Path = Path("/proc/self/status")) -> int:
    """A value of one of the system's files in bytes."""
    return next(
        int(line.split()[1]) * 1024 for line in file.read_text().splitlines() if line.startswith(name)
    )


def trim() -> None:
    """Gives freed memory back to the system, where the C library can."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
