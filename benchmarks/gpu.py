"""Everything that a GPU has to answer, in a few minutes: right, how fast, and how far from the bound.

    python -m benchmarks.gpu --output FILE [--seconds 480] [--steps machine kernels ...] [--wheels FOLDER]
    python -m benchmarks.gpu --output FILE --cpu     # the same at tiny sizes, in Triton's interpreter
    python -m benchmarks.gpu --output FILE --show    # the table of what is in FILE

Each step is a process of its own with a time limit, so that neither a fault of the GPU nor a kernel that
hangs costs more than that step. Each result is a line of JSON in FILE, written at once; cases that are in the
file are not run again. What is wrong is a line with "ok": false and ends nothing. Steps, in this order:

- machine: the GPU, versions, how fast it copies, multiplies and launches;
- compile: all kernels that are timed below, in as many processes as there are cores, into an empty cache;
- check: each kernel, hybrid mixers and whole blocks (by Triton with gradients, on tensor cores) against
  float64, outputs filled with NaN beforehand;
- kernels: each kernel alone, in each configuration, in CUDA graphs, second-level cache cold and warm;
- blocks: ΔConv by each backend, and flash attention: device, wall and host time of a call;
- models: SDXL and SD1.5 of diffusers with random weights: attention, ΔConv, no self-attention, hybrid mixers;
- training: forward and backward of blocks;
- large, large-model: blocks and the U-Net of SD1.5 at 1080 x 1920 latents, a picture of 8640 x 15360;
- profile: what limits the kernels, by Nsight Compute (ncu).

"models" and "large-model" need diffusers: installed, or as wheels in --wheels FOLDER. Prints a table at the
end, also when time is up. Exits with status 1 if anything was wrong or failed.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
LIMITS = {
    "machine": 25,
    "compile": 60,
    "check": 40,
    "kernels": 40,
    "blocks": 40,
    "models": 90,
    "training": 30,
    "large": 40,
    "large-model": 60,
    "profile": 50,
}  # seconds
RESERVE = 4  # seconds in which the table is printed
GPU_FAULT = 3  # exit status of a step whose GPU context is lost; the step starts again after that case
UNFINISHED = 4  # exit status of a step whose time was up before its last case
STARTS = 4  # of a step, at most
WIDEST = 11_000  # characters of the table, whose end is left out first
LONG = ("kernels", "compile")  # steps whose rows come last in it

Row = dict[str, Any]


class Ended(Exception):
    """Somebody wants this program to end."""


def main() -> int:
    command = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument("--output", type=Path, required=True, metavar="FILE", help="lines of JSON")
    command.add_argument("--seconds", type=float, default=480, help="for all of it (%(default)s)")
    command.add_argument("--steps", nargs="+", choices=LIMITS, default=list(LIMITS), metavar="STEP")
    command.add_argument("--wheels", type=Path, metavar="FOLDER", help="wheels that are not installed here")
    command.add_argument("--cpu", action="store_true", help="tiny sizes, without a GPU")
    command.add_argument("--show", action="store_true", help="measure nothing, print the table of FILE")
    args = command.parse_args()
    if args.show:
        print("\n".join(table(read(args.output))))
        return 0
    end = time.time() + args.seconds - RESERVE
    signal.signal(signal.SIGTERM, stop)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        if args.wheels:
            unpack(args.wheels, Path(scratch) / "packages")
        steps = [Step(name, args.output, Path(scratch), args.cpu) for name in LIMITS if name in args.steps]
        try:
            for step in steps:  # all of them: importing takes longer than some of them run
                step.start()
            for step in steps:
                step.run(end)
        except (Ended, KeyboardInterrupt):
            print("ended before it was done", flush=True)
        finally:
            for step in steps:
                step.kill()
    rows = read(args.output)
    print("\n".join(table(rows))[:WIDEST], flush=True)
    return int(any(not row["ok"] for row in rows))


def stop(*_: Any) -> None:
    raise Ended


def unpack(wheels: Path, target: Path) -> None:
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as content:
            content.extractall(target)


class Step:
    """A step in a process of its own, which imports what it needs and waits until it is told to begin."""

    def __init__(self, name: str, output: Path, scratch: Path, cpu: bool) -> None:
        self.name, self.output, self.cpu = name, output, cpu
        self.errors = scratch / f"{name}.txt"
        self.process: subprocess.Popen[str] | None = None
        paths = [str(scratch / "packages"), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "TRITON_CACHE_DIR": str(scratch / "triton"),
            "HF_HUB_OFFLINE": "1",
            "DELTACONV_TUNE_CACHE": str(scratch / "choices.json"),
        }
        if cpu:
            self.environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}

    def start(self) -> None:
        line = [sys.executable, "-m", "benchmarks.gpu_steps", self.name, str(self.output.absolute())]
        with self.errors.open("w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                line + (["--cpu"] if self.cpu else []),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=REPOSITORY,
                env=self.environment,
                start_new_session=True,
            )

    def run(self, end: float) -> None:
        """Lets it begin, and waits until it is done or its time is up."""
        before, begun, until = len(read(self.output)), time.time(), end
        status: int | None = None
        for turn in range(STARTS):
            if until - time.time() < 2:
                break
            if self.process is None:
                self.start()
            self.imported(until)
            if turn == 0:
                begun = time.time()
                until = min(end, begun + LIMITS[self.name])
            status = self.once(until)
            if status != GPU_FAULT:
                break
        taken = time.time() - begun
        over = status in (None, UNFINISHED)
        said = "time is up" if over else "done" if status == 0 else f"failed with status {status}"
        print(f"{self.name}: {len(read(self.output)) - before} rows, {taken:.1f} s, {said}", flush=True)
        row = {"step": self.name, "case": "step", "ok": over or status == 0, "seconds": round(taken, 1)}
        if not row["ok"]:
            row["error"] = self.errors.read_text(encoding="utf-8", errors="replace")[-1500:]
        append(self.output, row | {"status": said})

    def imported(self, until: float) -> None:
        """Waits for the line that a step prints when it has imported everything, or for its end."""
        assert self.process is not None and self.process.stdout is not None
        if select.select([self.process.stdout], [], [], max(0.0, until - time.time()))[0]:
            self.process.stdout.readline()

    def once(self, until: float) -> int | None:
        """The exit status; None when time was up."""
        assert self.process is not None
        process, self.process = self.process, None
        try:
            process.communicate(f"{until}\n", timeout=max(0.0, until - time.time()) + 1)
        except subprocess.TimeoutExpired:
            kill(process)
            return None
        except BaseException:
            kill(process)
            raise
        kill(process)  # what it started and left behind
        return process.returncode

    def kill(self) -> None:
        if self.process is not None:
            kill(self.process)


def kill(process: subprocess.Popen[str]) -> None:
    """Ends a process and those that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


# ---- rows ----


def append(file: Path, row: Row) -> None:
    """Adds a line that is on disk when this returns; several processes may do so at once."""
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
    target = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(target, line)
        os.fsync(target)
    finally:
        os.close(target)


def read(file: Path) -> list[Row]:
    """All rows; a line that was torn is left out."""
    rows = []
    if file.exists():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                pass
    return rows


# ---- the table ----


def table(rows: Iterable[Row]) -> list[str]:
    """The rows, short enough for the last page of a log."""
    rows = list(rows)
    wrong = [row for row in rows if not row["ok"]]
    lines = [f"\n== {len(wrong)} of {len(rows)} wrong or failed"]
    lines += [f"{row['step']} {row['case']}: {reason(row)}" for row in wrong[:16]]
    for step in sorted(LIMITS, key=lambda step: step in LONG):
        own = [row for row in rows if row["step"] == step and row["case"] != "step"]
        if own:
            bad = sum(not row["ok"] for row in own)
            lines.append(f"\n== {step}: {len(own)} rows" + (f", {bad} NOT RIGHT" if bad else ""))
            measured = [row for row in own if "error" not in row]
            try:
                lines += SHORT.get(step, plain)(measured)
            except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError):
                lines += plain(measured)[:20]
    return lines


def reason(row: Row) -> str:
    first = next(iter(str(row.get("error", "wrong result")).strip().splitlines()), "")
    last = str(row.get("error", "")).strip().rpartition("\n")[2]
    numbers = compact(row, ("step", "case", "ok", "error", "traceback", "seconds", "about", "how"))
    return f"{last[:140] if row['case'] == 'step' else first[:140]} {numbers[:90]}"


def compact(row: Row, without: Iterable[str] = ("step", "case", "ok", "seconds")) -> str:
    return "  ".join(f"{name} {number(value)}" for name, value in row.items() if name not in without)


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plain(rows: list[Row]) -> list[str]:
    return [f"{row['case']:28.48} {compact(row)[:230]}" for row in rows]


def compiled(rows: list[Row]) -> list[str]:
    slow = sorted(rows, key=lambda row: -row["seconds"])[:3]
    total = sum(row["seconds"] for row in rows)
    worst = ", ".join(f"{row['case']} {row['seconds']:.1f} s" for row in slow)
    return [f"{total:.0f} s of one core in all; longest: {worst}", *left_out(rows)]


def left_out(rows: list[Row]) -> list[str]:
    """Why cases did not run, each reason once."""
    reasons = [row["why_not"] for row in rows if "why_not" in row]
    return [f"{reasons.count(why)} left out: {why[:150]}" for why in dict.fromkeys(reasons)]


def checked(rows: list[Row]) -> list[str]:
    ran = [row for row in rows if "why_not" not in row]
    worst = sorted(ran, key=lambda row: -row["times_torch"])[:3]
    right = sum(row["ok"] for row in ran)
    return [f"{right} of {len(ran)} right; largest errors:", *plain(worst), *left_out(rows)]


def kernels(rows: list[Row]) -> list[str]:
    """Of each case and family of kernels the fastest one: µs with cold and with warm caches."""
    lines = [f"{'µs, cold/warm':32} bound"]
    ran = [row for row in rows if "why_not" not in row]
    for about in dict.fromkeys(row["about"] for row in ran):
        best: dict[str, Row] = {}
        for row in sorted((row for row in ran if row["about"] == about), key=lambda row: row["cold_us"]):
            best.setdefault(family(row["how"]), row)
        bound = next(iter(best.values()))["bound_us"]
        parts = [
            f"{row['how']} {row['cold_us']:.1f}/{row['warm_us']:.1f} ({row['cold_us'] / bound:.1f}x)"
            for row in best.values()
        ]
        lines.append(f"{about:32} {bound:5.1f} {'; '.join(parts)}")
    return lines + left_out(rows)


def family(how: str) -> str:
    if how.startswith("tensor cores"):
        return "tensor cores"
    return "PyTorch" if how in ("cuDNN channels-last", "channels-first", "PyTorch") else "Triton"


def blocks(rows: list[Row]) -> list[str]:
    """Each block in a line: milliseconds of the device in a graph, of the wall, and of the host."""
    lines = [f"{'ms, graph/eager/host':26} bound"]
    cases: dict[str, list[Row]] = {}
    for row in rows:
        if "why_not" in row:
            continue
        cases.setdefault(row["case"].rpartition(" ")[0], []).append(row)
    for case, own in cases.items():
        bound = own[0]["bound_ms"]
        parts = [
            f"{row['case'].rpartition(' ')[2]} {row['graph_ms']:.3f}/{row['eager_ms']:.3f}/"
            f"{row['host_ms']:.3f} ({row['graph_ms'] / bound:.1f}x)"
            for row in own
        ]
        lines.append(f"{case:26} {bound:.3f} {'; '.join(parts)}")
    return lines + left_out(rows)


SHORT = {"compile": compiled, "check": checked, "kernels": kernels, "blocks": blocks}


if __name__ == "__main__":
    sys.exit(main())
