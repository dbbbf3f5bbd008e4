"""What every step is given, and how it times something."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import statistics
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaconv_core import bench

from ..gpu import GPU_FAULT, Row, append, read

BANDWIDTH, RATE = 3.0e12, 798e12  # of the bound: bytes and floating point operations per second of an H100
CACHE = 160e6  # bytes, more than any second-level cache holds three times
HALF_DTYPES = (torch.float16, torch.bfloat16)
DTYPES = (*HALF_DTYPES, torch.float32)
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
AHEAD = 1_000_000  # cycles of the GPU
Size = tuple[int, int]


class NotCaptured(Exception):
    """A CUDA graph was not captured; what PyTorch does after that in this process is uncertain."""


class Run:
    """What a step is given.

    Args:
        step: its name.
        output: the file of rows.
        until: when to stop, as time.time().
        cpu: tiny sizes, on the CPU.
    """

    def __init__(self, step: str, output: Path, until: float, cpu: bool) -> None:
        self.step, self.output, self.until, self.tiny = step, output, until, cpu
        self.device = torch.device("cpu" if cpu else "cuda")
        self.unfinished = False
        self.known = {row["case"] for row in read(output) if row["step"] == step and row["case"] != "step"}

    def pick(self, full: Any, tiny: Any) -> Any:
        return tiny if self.tiny else full

    def case(self, name: str, measure: Callable[[], Row]) -> None:
        """Runs a case, unless its row is there or time is up. Its random numbers depend on its name alone."""
        if name in self.known:
            return
        if time.time() > self.until:
            self.unfinished = True
            return
        begun = time.time()
        torch.manual_seed(zlib.crc32(name.encode()))
        row = self.tried(measure)
        broken = row.pop("broken", False) or not (row["ok"] or self.works())
        append(
            self.output, {"step": self.step, "case": name, **row, "seconds": round(time.time() - begun, 2)}
        )
        self.known.add(name)
        if broken:
            os._exit(GPU_FAULT)

    def cases(self, name: str, several: Callable[[], None]) -> None:
        """Runs a function that prepares something and then runs cases; what it raises costs only those."""
        if time.time() > self.until:
            self.unfinished = True
            return
        failed = self.tried(lambda: several() or {})
        if not failed["ok"]:
            self.known.discard(name)
            self.case(name, lambda: failed)

    def tried(self, measure: Callable[[], Row]) -> Row:
        try:
            return {"ok": True} | measure()
        except Exception as error:
            text = f"{type(error).__name__}: {error}"[:600]
            row: Row = {"ok": False, "error": text, "traceback": traceback.format_exc()[-1500:]}
            return row | {"broken": isinstance(error, NotCaptured)}

    def works(self) -> bool:
        """Whether this process can still do something with the GPU."""
        gc.collect()
        if self.tiny:
            return True
        try:
            torch.cuda.synchronize()
            torch.zeros(1, device=self.device).add_(1).item()
            torch.cuda.empty_cache()
        except Exception:
            return False
        return True


def elapsed(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median milliseconds of a run: of the device between two events, or of the CPU."""
    taken = []
    for _ in range(rounds):
        if device.type == "cuda":
            torch.cuda._sleep(AHEAD)  # what is timed is queued meanwhile
        with bench.Span(device) as span:
            run()
        taken.append(span.seconds)
    return 1000 * statistics.median(taken)


def graphed(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The run as one launch; the run itself where there are no CUDA graphs."""
    if device.type != "cuda":
        return run
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        run()
    torch.cuda.current_stream().wait_stream(beside)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except Exception as error:
        raise NotCaptured(f"{type(error).__name__}: {error}") from error
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def each(runs: Sequence[Callable[[], object]]) -> Callable[[], None]:
    def all_of_them() -> None:
        for run in runs:
            run()

    return all_of_them


def cold_and_warm(make: Callable[[Tensor], Callable[[], object]], x: Tensor, rounds: int = 5) -> Row:
    """µs of one run inside a graph of many: each on its own copy of the input, and all on the same one."""
    copies = 1 if x.device.type == "cpu" else max(8, min(40, math.ceil(CACHE / x.nbytes)))
    runs = [make(x.clone()) for _ in range(copies)]
    times = {}
    for name, chosen in (("cold_us", runs), ("warm_us", [runs[0]] * len(runs))):
        replay = graphed(each(chosen), x.device)
        times[name] = 1000 * elapsed(replay, x.device, rounds if x.is_cuda else 1) / len(runs)
        del replay
    return times


def host_ms(run: Callable[[], object], device: torch.device, calls: int) -> float:
    """Milliseconds that the host needs to queue a call; the queue is emptied before it can fill up."""
    taken, at_once = [], min(calls, 10)
    for _ in range(calls // at_once):
        bench.synchronize(device)
        begun = time.perf_counter()
        for _ in range(at_once):
            run()
        taken.append((time.perf_counter() - begun) / at_once)
    bench.synchronize(device)
    return 1000 * statistics.median(taken)


def wall_ms(run: Callable[[], object], device: torch.device, calls: int) -> float:
    """Milliseconds of a call in a row of calls that is waited for at its end."""
    bench.synchronize(device)
    begun = time.perf_counter()
    for _ in range(calls):
        run()
    bench.synchronize(device)
    return 1000 * (time.perf_counter() - begun) / calls


def in_parallel(run: Run, cases: Sequence[tuple[str, Callable[[], Row]]]) -> None:
    """Cases, each in one of as many processes as there are cores; one that dies is replaced."""
    context = multiprocessing.get_context("fork")  # nothing is imported again
    workers = run.pick(max(1, len(os.sched_getaffinity(0)) - 2), 2)
    turn = context.Value("i", 0)

    def work() -> None:
        while True:
            with turn.get_lock():
                mine, turn.value = turn.value, turn.value + 1
            if mine >= len(cases):
                return
            run.case(*cases[mine])

    alive = []
    for _ in range(min(workers, len(cases))):
        alive.append(context.Process(target=work))
        alive[-1].start()
    while alive:
        for process in list(alive):
            process.join(0.05)
            if process.exitcode is None:
                continue
            alive.remove(process)
            if process.exitcode and turn.value < len(cases) and time.time() < run.until:
                alive.append(context.Process(target=work))
                alive[-1].start()
    done = {row["case"] for row in read(run.output) if row["step"] == run.step}
    for name, _ in cases:
        if name in done:
            continue
        if time.time() > run.until:
            run.unfinished = True
        else:
            row = {"step": run.step, "case": name, "ok": False, "error": "its process died", "seconds": 0.0}
            append(run.output, row)
