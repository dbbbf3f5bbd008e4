"""The steps of `benchmarks.gpu`, each run by it in a process of its own; see there.

    python -m benchmarks.gpu_steps STEP FILE [--cpu]     # then a line with the time to end at, as time.time()

A case is a function that returns what is measured. Its row holds that, or the error that it raised.
"""

from __future__ import annotations

import argparse
import csv
import gc
import io
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from deltaconv_core import BlockSpec, DeltaConvBlock, bench
from deltaconv_core.bench import machine as machine_sizes
from deltaconv_core.block.flops import block_flops
from deltaconv_core.block.ops import by_torch, choose
from deltaconv_core.block.ops.by_torch import TorchBackend
from deltaconv_core.block.reference import depthwise, gated, reference_block, shrunk, stretched
from testing.compare import relative_l2

from .gpu import GPU_FAULT, UNFINISHED, Row, append, read

BANDWIDTH, RATE = 3.0e12, 798e12  # of the bound: bytes and floating point operations per second of an H100
CACHE = 160e6  # bytes, more than any second-level cache holds three times
HALF_DTYPES = (torch.float16, torch.bfloat16)
DTYPES = (*HALF_DTYPES, torch.float32)
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
AHEAD = 1_000_000  # cycles of the GPU
UNUSED = ("transformers", "torchvision", "peft", "accelerate")  # what diffusers would import for seconds
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
        """Runs a case, unless its row is there or time is up."""
        if name in self.known:
            return
        if time.time() > self.until:
            self.unfinished = True
            return
        begun = time.time()
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


def main() -> int:
    command = argparse.ArgumentParser()
    command.add_argument("step")
    command.add_argument("output", type=Path)
    command.add_argument("--cpu", action="store_true")
    args = command.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    if args.cpu:
        torch.set_num_threads(1)
        machine_sizes.COPIED, machine_sizes.SIDE = {"cpu": 2**20}, {"cpu": 64}
    for name in ("triton", "deltaconv_core.block.ops.triton.project"):  # imported while others run
        try:
            import_module(name)
        except Exception as error:
            print(f"{name}: {error}", file=sys.stderr)
    if args.step in ("models", "large-model"):
        for name in UNUSED:
            sys.modules[name] = None  # type: ignore[assignment]
        try:
            import_module("deltaconv_core.diffusers")
            import_module("diffusers").UNet2DConditionModel  # noqa: B018 (imported when asked for)
        except Exception as error:
            print(f"diffusers: {error}", file=sys.stderr)
    print("ready", flush=True)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nobody reads on
    line = sys.stdin.readline()
    if not line:
        return 0
    run = Run(args.step, args.output, float(line), args.cpu)
    STEPS[args.step](run)
    return UNFINISHED if run.unfinished else 0


# ---- time ----


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


# ---- 0: the machine ----


def machine(run: Run) -> None:
    device = run.device
    run.case("versions", lambda: versions(run))
    run.case("copies", lambda: {"GB_s": bench.copy_bandwidth(device) / 1e9})
    for dtype in run.pick(DTYPES, (torch.float32,)):
        run.case(f"products {NAMES[dtype]}", partial(products, run, dtype))
    run.case("launch", lambda: launches(run))
    run.case("clocks under load", lambda: loaded(run))


def versions(run: Run) -> Row:
    row: Row = bench.describe(run.device) | {"python": platform.python_version()}
    for name in ("triton", "diffusers", "numpy"):
        try:
            row[name] = import_module(name).__version__
        except Exception as error:
            row[name] = f"{type(error).__name__}"
    if not run.tiny:
        properties = torch.cuda.get_device_properties(0)
        row |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        row |= {"multiprocessors": properties.multi_processor_count, "bytes": properties.total_memory}
        row["driver"] = smi("name,driver_version,clocks.max.sm,power.limit")
    return row


def smi(what: str) -> str:
    try:
        line = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
        return subprocess.run(line, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


def products(run: Run, dtype: torch.dtype) -> Row:
    """float32 as tf32."""
    torch.set_float32_matmul_precision("high")
    return {"TFLOP_s": bench.matmul_rate(run.device, dtype) / 1e12}


def launches(run: Run) -> Row:
    from deltaconv_core.block.ops.triton.tuning import nothing

    x = torch.zeros(16, device=run.device)
    row = {"torch_host_us": 1000 * host_ms(lambda: x.add_(1), run.device, 1000)}
    if not run.tiny:
        row["triton_host_us"] = 1000 * host_ms(lambda: nothing[(1,)](), run.device, 1000)
        many = graphed(each([lambda: nothing[(1,)]()] * 200), run.device)
        row["in_graph_us"] = 1000 * elapsed(many, run.device, 10) / 200
    return row


def loaded(run: Run) -> Row:
    if run.tiny:
        return {"clocks": "no GPU"}
    a = torch.randn(8192, 8192, device=run.device, dtype=torch.bfloat16)
    b = a @ a
    for _ in range(600):  # about a second
        torch.mm(a, a, out=b)
    row = {"clocks": smi("clocks.sm,clocks.mem,power.draw,temperature.gpu")}
    torch.cuda.synchronize()
    return row


# ---- the kernels' inner life: the only place that knows how they are tuned ----


@dataclass
class Kernel:
    """One Triton kernel whose configuration can be forced."""

    tuned: Any

    @property
    def configurations(self) -> list[Any]:
        return list(self.tuned.tuner.configs)

    @contextmanager
    def only(self, number: int) -> Iterator[None]:
        """With this configuration alone (or the last one, where there are fewer)."""
        tuner = self.tuned.tuner
        before = tuner.configs
        tuner.configs = [before[min(number, len(before) - 1)]]
        try:
            yield
        finally:
            tuner.configs = before


def triton_kernels() -> dict[str, Kernel]:
    """Name -> kernel, of those whose configurations can be chosen; none in the interpreter."""
    found = {}
    places = {
        "depthwise": ("depthwise_gate", "_depthwise"),
        "weight gradient": ("depthwise_gate", "_weight_gradient"),
        "project": ("project", "_project"),
        "pool": ("pool", "_pool"),
        "enlarge": ("enlarge", "_adjoint"),
    }
    for name, (module, attribute) in places.items():
        tuned = getattr(import_module(f"deltaconv_core.block.ops.triton.{module}"), attribute, None)
        if hasattr(getattr(tuned, "tuner", None), "configs"):
            found[name] = Kernel(tuned)
    return found


def configurations(name: str) -> list[tuple[str, Any]]:
    """How a kernel may run: text, and a context in which it does."""
    kernel = triton_kernels().get(name)
    if kernel is None:
        return [("as chosen", nullcontext())]
    return [
        (f"{'/'.join(map(str, c.kwargs.values()))} {c.num_warps}w", kernel.only(i))
        for i, c in enumerate(kernel.configurations)
    ]


@contextmanager
def only(number: int) -> Iterator[None]:
    """Every kernel with its configuration of this number: nothing is timed, and little compiled."""
    with ExitStack() as stack:
        for kernel in triton_kernels().values():
            stack.enter_context(kernel.only(number))
        yield


def tensor_core_kernel() -> Any:
    """The module of the depth-wise kernel on tensor cores; a text that says why there is none."""
    try:
        return import_module("deltaconv_core.block.ops.cuda")
    except Exception as error:
        return f"{type(error).__name__}: {error}"


# ---- many processes ----


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


# ---- 1: compile ----


def compile_all(run: Run) -> None:
    jobs: dict[str, Callable[[], Row]] = {}
    numbers = range(run.pick(4, 1))
    sizes = dict.fromkeys(
        [*timed_kernels(run), *((spec.inter // 2, spec.kernel_size) for spec in specs(run))]
    )
    timed = set(timed_kernels(run))
    for number in numbers:
        for dtype in run.pick(HALF_DTYPES, (torch.float32,)):
            jobs[f"project {NAMES[dtype]} {number}"] = partial(compile_project, run, dtype, number)
            jobs[f"pool {NAMES[dtype]} {number}"] = partial(compile_pool, run, dtype, number)
    for half, K in sorted(sizes, key=lambda size: -size[1]):  # what takes longest first
        for number in numbers:
            for dtype in run.pick(HALF_DTYPES, (torch.float32,)):
                if (half, K) in timed or dtype != torch.bfloat16:
                    name = f"depthwise {NAMES[dtype]} half {half} K{K} {number}"
                    jobs[name] = partial(compile_depthwise, run, dtype, half, K, number)
    for dtype in run.pick(HALF_DTYPES, ()):
        jobs[f"training {NAMES[dtype]}"] = partial(training_row, run, BlockSpec(640, 9), 8, dtype, "triton")
    for dtype in HALF_DTYPES:
        for K in run.pick((3, 5, 7, 9, 11, 13), ()):
            jobs[f"tensor cores {NAMES[dtype]} K{K}"] = partial(compile_tensor_cores, run, dtype, K)
    in_parallel(run, list(jobs.items()))


def timed_kernels(run: Run) -> list[tuple[int, int]]:
    """(half of the inner channels, K) of the kernels that are timed alone."""
    return [(channels // 4, K) for channels in run.pick((640, 1152), (32,)) for K in run.pick((9, 13), (3,))]


def specs(run: Run) -> list[BlockSpec]:
    """Distinct blocks of the models and of the blocks that are timed."""
    from deltaconv_core.sites import authors_specs

    if run.tiny:
        return [BlockSpec(32, 3)]
    return list(dict.fromkeys([*authors_specs("sdxl").values(), *authors_specs("sd15").values()]))


def triton_backend() -> Any:
    return import_module("deltaconv_core.block.ops.triton").BACKEND


def compile_depthwise(run: Run, dtype: torch.dtype, half: int, K: int, number: int) -> Row:
    u = torch.randn(2, 8, 8, 2 * half, device=run.device).to(dtype)
    weight = torch.randn(2 * half, 1, K, K, device=run.device).to(dtype)
    with only(number):
        triton_backend().depthwise_gate(u, weight, None, "simple")
    bench.synchronize(run.device)
    return {}


def compile_project(run: Run, dtype: torch.dtype, number: int) -> Row:
    stage = torch.float32 if dtype == torch.float16 else dtype
    stages = [torch.randn(2, side, side, 160, device=run.device).to(stage) for side in (8, 4)]
    weight = torch.randn(640, 320, device=run.device).to(dtype)
    with only(number):
        triton_backend().project(stages, weight, weight.new_zeros(2, 1, 640), (8, 8), "concat")
    bench.synchronize(run.device)
    return {}


def compile_pool(run: Run, dtype: torch.dtype, number: int) -> Row:
    with only(number):
        triton_backend().shrink(torch.randn(2, 8, 8, 320, device=run.device).to(dtype), 0.5, "average")
    bench.synchronize(run.device)
    return {}


def compile_tensor_cores(run: Run, dtype: torch.dtype, K: int) -> Row:
    u = torch.randn(1, 64, 16, 16, device=run.device).to(dtype)
    weight = torch.randn(64, 1, K, K, device=run.device).to(dtype)
    call = tensor_cores(u, weight)
    if isinstance(call, str):
        return {"why_not": call}
    call()
    bench.synchronize(run.device)
    return {}


def tensor_cores(u: Tensor, weight: Tensor, kind: str = "simple", **options: Any) -> Any:
    """A call of the tensor-core kernel for u (B, c, H, W); a text where it does not run."""
    cuda = tensor_core_kernel()
    if isinstance(cuda, str):
        return cuda
    if why := cuda.why_not(u, weight):
        return str(why)
    channels = u.shape[1]
    factor = math.sqrt(channels / 2) if kind == "simple" else 1 / math.sqrt(channels)
    out = torch.float32 if u.dtype == torch.float16 else u.dtype
    return lambda: cuda.depthwise_gate(u, weight, None, kind == "sigmoid", factor, out, **options)


# ---- 2: right? ----


SHAPES: tuple[Size, ...] = ((67, 93), (1, 37), (128, 128), (33, 46), (37, 1), (64, 64), (45, 61), (2, 2))
TINY_SHAPES: tuple[Size, ...] = ((5, 6), (1, 4))


def check(run: Run) -> None:
    cases: dict[str, Callable[[], Row]] = {}
    sizes = run.pick((9, 13, 7, 5, 3, 11, 15, 17), (3,))
    shapes = run.pick(SHAPES, TINY_SHAPES)
    for number, K in enumerate(sizes):
        for dtype in DTYPES:
            for more in range(run.pick(3, 1)):
                size = shapes[(number + 3 * more) % len(shapes)]
                kind = ("simple", "sigmoid", "scaled")[more]
                name = f"{size[0]}x{size[1]} K{K} {NAMES[dtype]} {kind}"
                cases[f"depthwise {name}"] = partial(check_depthwise, run, size, K, dtype, kind, False)
                cases[f"tensor cores {name}"] = partial(check_depthwise, run, size, K, dtype, kind, True)
        for dtype in run.pick(DTYPES, (torch.float32,)):
            spec, size = block_to_check(K, number, run), shapes[(number + run.pick(0, 1)) % len(shapes)]
            gradients = number < 3
            name = f"{size[0]}x{size[1]} K{K} {NAMES[dtype]} {'and gradients' if gradients else 'forward'}"
            cases[f"block {name}"] = partial(check_block, run, size, spec, dtype, gradients)
    for size in shapes:
        for dtype in run.pick(DTYPES, (torch.bfloat16,)):
            name = f"{size[0]}x{size[1]} {NAMES[dtype]}"
            cases[f"project {name}"] = partial(check_project, run, size, dtype)
            cases[f"pool {name}"] = partial(check_pool, run, size, dtype)
    in_parallel(run, list(cases.items()))


def block_to_check(K: int, number: int, run: Run) -> BlockSpec:
    dim = run.pick(320, 32)
    variants: tuple[dict[str, Any], ...] = (
        {},
        {"gate": "sigmoid", "depthwise_bias": True},
        {"gate": "scaled", "merge": "sum", "scales": (1.0, 0.5, 1 / 3)},
    )
    return BlockSpec(dim, K, **variants[number % len(variants)])


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is handed out holds NaN until something is written there."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert bool(torch.empty(8, device="cpu").isnan().all())
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def judged(found: dict[str, Tensor], torchs: dict[str, Tensor], truth: dict[str, Tensor], eps: float) -> Row:
    """The worst error, as a part of what is allowed: twice PyTorch's own in the same dtype, or rounding."""
    row: Row = {"ok": True, "error_l2": 0.0, "torch_l2": 0.0, "times_torch": 0.0}
    for name, exact in truth.items():
        own, theirs = relative_l2(found[name], exact), relative_l2(torchs[name], exact)
        times = own / max(theirs, eps / 2)
        if not times <= row["times_torch"]:
            row |= {"of": name, "error_l2": own, "torch_l2": theirs, "times_torch": times}
        row["ok"] = row["ok"] and own <= max(2 * theirs, 2 * eps if eps < 1e-5 else eps / 2)
    return row


def check_depthwise(
    run: Run, size: Size, K: int, dtype: torch.dtype, kind: str, on_tensor_cores: bool
) -> Row:
    half = run.pick(80, 16)
    u = torch.randn(2, *size, 2 * half, device=run.device).to(dtype)
    weight = (torch.randn(2 * half, 1, K, K, device=run.device) / K).to(dtype)
    bias = torch.randn(2 * half, device=run.device).to(dtype) if kind == "sigmoid" else None
    exact = gated(depthwise(u.double(), weight.double(), None if bias is None else bias.double()), kind)
    theirs = TorchBackend().depthwise_gate(u, weight, bias, kind)
    with poisoned():
        if on_tensor_cores:
            first = u.permute(0, 3, 1, 2).contiguous()
            cuda = tensor_core_kernel()
            why = cuda if isinstance(cuda, str) else cuda.why_not(first, weight)
            if why:
                return {"why_not": str(why)}
            factor = math.sqrt(half) if kind == "simple" else 1 / math.sqrt(2 * half)
            out = torch.float32 if dtype == torch.float16 else dtype
            own = cuda.depthwise_gate(first, weight, bias, kind == "sigmoid", factor, out)
            own = own.permute(0, 2, 3, 1)
        else:
            with only(1):
                own = triton_backend().depthwise_gate(u, weight, bias, kind)
    return judged({"y": own}, {"y": theirs}, {"y": exact}, torch.finfo(dtype).eps)


def check_project(run: Run, size: Size, dtype: torch.dtype) -> Row:
    half, C = run.pick(80, 16), run.pick(320, 32)
    stage = torch.float32 if dtype == torch.float16 else dtype
    small = by_torch.stage_size(size, 0.5)
    stages = [torch.randn(2, *s, half, device=run.device).to(stage) for s in (size, small)]
    if dtype == torch.float16:
        stages[0] *= 3e4  # products of two halves leave float16's range
    weight = (torch.randn(C, 2 * half, device=run.device) / half / (3e4 if dtype == torch.float16 else 1)).to(
        dtype
    )
    bias = torch.randn(2, 1, C, device=run.device).to(dtype)
    full = torch.cat([stages[0].double(), stretched(stages[1].double(), *size)], dim=3).flatten(1, 2)
    exact = full @ weight.double().T + bias.double()
    theirs = TorchBackend().project(stages, weight, bias, size, "concat")
    with poisoned(), only(1):
        own = triton_backend().project(stages, weight, bias, size, "concat")
    return judged({"y": own}, {"y": theirs}, {"y": exact}, torch.finfo(dtype).eps)


def check_pool(run: Run, size: Size, dtype: torch.dtype) -> Row:
    u = torch.randn(2, *size, run.pick(160, 32), device=run.device).to(dtype)
    theirs = TorchBackend().shrink(u, 0.5, "average")
    with poisoned(), only(0):
        own = triton_backend().shrink(u, 0.5, "average")
    exact = shrunk(u.double(), 0.5, "average")
    return judged({"y": own}, {"y": theirs}, {"y": exact}, torch.finfo(dtype).eps)


def check_block(run: Run, size: Size, spec: BlockSpec, dtype: torch.dtype, gradients: bool) -> Row:
    block = DeltaConvBlock(spec, device=run.device)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5 / max(1, parameter[0].numel()) ** 0.5)
    block = block.to(dtype)
    x = torch.randn(2, size[0] * size[1], spec.dim, device=run.device).to(dtype)
    upstream = torch.randn_like(x)
    weights = {k: v.detach().double().requires_grad_(gradients) for k, v in block.named_parameters()}
    tokens = x.double().requires_grad_(gradients)
    y = reference_block(tokens, size, spec, weights)
    truth = {"output": y.detach()}
    if gradients:
        y.backward(upstream.double())
        truth |= {"x": known(tokens.grad), **{k: known(v.grad) for k, v in weights.items()}}
    with choose.forced("torch"):
        theirs = outcome(block, x, size, upstream, gradients)
    with choose.forced("triton"), only(1), poisoned():
        own = outcome(block, x, size, upstream, gradients)
    return judged(own, theirs, truth, torch.finfo(dtype).eps)


def outcome(
    block: DeltaConvBlock, x: Tensor, size: Size, upstream: Tensor, gradients: bool
) -> dict[str, Tensor]:
    if not gradients:
        with torch.inference_mode():
            return {"output": block(x, size)}
    block.zero_grad()
    x = x.clone().requires_grad_()
    y = block(x, size)
    y.backward(upstream)
    found = {"output": y.detach(), "x": known(x.grad)}
    return found | {k: known(v.grad).clone() for k, v in block.named_parameters()}


def known(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient


# ---- 3: kernels alone ----


def kernels(run: Run) -> None:
    sides = run.pick((128, 64), (4,))
    widths = run.pick((640, 1152), (32,))
    dtypes = run.pick(HALF_DTYPES, (torch.float32,))
    with torch.inference_mode():
        for side, dtype, channels, K in product(sides, dtypes, widths, run.pick((9, 13), (3,))):
            prepared = partial(depthwise_cases, run, side, channels, K, dtype)
            run.cases(f"depthwise {side}² C{channels} K{K} {NAMES[dtype]}", prepared)
        for side, channels, dtype in product(sides, widths, dtypes):
            run.cases(
                f"others {side}² C{channels} {NAMES[dtype]}", partial(other_cases, run, side, channels, dtype)
            )


def depthwise_cases(run: Run, side: int, channels: int, K: int, dtype: torch.dtype) -> None:
    half = channels // 4
    about = f"depthwise {side}² C{channels} K{K} {NAMES[dtype]}"
    bytes_moved = 2 * side * side * 3 * half * dtype.itemsize
    operations = 2 * 2 * side * side * 2 * half * K * K
    bound = 1e6 * max(bytes_moved / BANDWIDTH, operations / RATE)
    u = torch.randn(2, side, side, 2 * half, device=run.device).to(dtype)
    # In memory the taps of neighboring channels are neighbors, so that the kernel's own order costs no copy.
    taps = (torch.randn(K * K, 2 * half, device=run.device) / K).to(dtype)
    weight = taps.t().reshape(2 * half, 1, K, K)
    plain = weight.contiguous()
    exact = TorchBackend().depthwise_gate(u.float(), plain.float(), None, "simple")

    def timed(how: str, make: Callable[[Tensor], Callable[[], Any]], x: Tensor, first: bool) -> Row:
        y = make(x)()
        error = relative_l2(y.permute(0, 2, 3, 1) if first else y, exact)
        row = {"ok": error < 0.02, "about": about, "how": how, "error_l2": error, "bound_us": bound}
        return row | cold_and_warm(make, x)

    for how, context in configurations("depthwise"):

        def triton(x: Tensor) -> Callable[[], Any]:
            return lambda: triton_backend().depthwise_gate(x, weight, None, "simple")

        def in_context(how: str = how, context: Any = context, make: Any = triton) -> Row:
            with context:
                return timed(how, make, u, False)

        run.case(f"{about}, {how}", in_context)
    first = u.permute(0, 3, 1, 2).contiguous()
    for rows in (0, 16, 32, 64):
        how = f"tensor cores R{rows or ' chosen'}"
        run.case(f"{about}, {how}", partial(on_tensor_cores, timed, how, first, plain, rows))
    for how, x in {"cuDNN channels-last": u.permute(0, 3, 1, 2), "channels-first": first}.items():

        def by_pytorch(x: Tensor) -> Callable[[], Any]:
            return lambda: by_torch.gate(by_torch.channels_last(x, plain, None), "simple")

        run.case(f"{about}, {how}", partial(timed, how, by_pytorch, x, True))


def on_tensor_cores(timed: Callable[..., Row], how: str, first: Tensor, weight: Tensor, rows: int) -> Row:
    call = tensor_cores(first, weight, rows=rows)
    if isinstance(call, str):
        return {"ok": True, "why_not": call}
    return timed(how, lambda x: tensor_cores(x, weight, rows=rows), first, True)


def other_cases(run: Run, side: int, channels: int, dtype: torch.dtype) -> None:
    half, positions = channels // 4, 2 * side * side
    name = f"{side}² C{channels} {NAMES[dtype]}"
    x = torch.randn(2, side * side, channels, device=run.device).to(dtype)
    up = nn.Linear(channels, 2 * half, device=run.device).to(dtype)
    stage = torch.float32 if dtype == torch.float16 else dtype
    g = torch.randn(2, side, side, half, device=run.device).to(stage)
    smaller = torch.randn(2, side // 2, side // 2, half, device=run.device).to(stage)
    weight = (torch.randn(channels, 2 * half, device=run.device) / half).to(dtype)
    bias = torch.randn(2, 1, channels, device=run.device).to(dtype)
    moved = positions * half * dtype.itemsize

    def project(g: Tensor) -> Callable[[], Any]:
        return lambda: triton_backend().project([g, smaller], weight, bias, (side, side), "concat")

    def timed(about: str, how: str, context: Any, make: Any, x: Tensor, moved: float, flops: float) -> Row:
        with context:
            make(x)()
            row = {"about": about, "how": how, "bound_us": 1e6 * max(moved / BANDWIDTH, flops / RATE)}
            return row | cold_and_warm(make, x)

    for how, context in configurations("project"):
        about, flops = f"project {name}", 2 * positions * half * channels * 1.25
        arguments = (about, how, context, project, g, 5.25 * moved, flops)
        run.case(f"{about}, {how}", partial(timed, *arguments))
    u = torch.randn(2, side, side, 2 * half, device=run.device).to(dtype)
    for how, context in configurations("pool"):
        about = f"pool {name}"
        make = lambda u: lambda: triton_backend().shrink(u, 0.5, "average")  # noqa: E731
        run.case(f"{about}, {how}", partial(timed, about, how, context, make, u, 2.5 * moved, 0))
    torchs: dict[str, tuple[Any, float, float]] = {
        "up": (lambda x: lambda: up(x), 6 * moved, 2 * positions * channels * 2 * half),
        "mean": (lambda x: lambda: mean(x, side), 4 * moved, 0),
    }
    for what, (make, least, flops) in torchs.items():
        about = f"{what} {name}"
        run.case(about, partial(timed, about, "PyTorch", nullcontext(), make, x, least, flops))


def mean(x: Tensor, side: int) -> Tensor:
    """As blocks take it."""
    columns = x.reshape(len(x), side, side, -1).mean(dim=1, dtype=torch.float32)
    return columns.mean(dim=1, keepdim=True).to(x.dtype)


# ---- 4 and 5: blocks ----


FORWARD = (
    (128, 640, 9),
    (64, 640, 9),
    (64, 1152, 13),
    (32, 1280, 9),
    (128, 640, 13),
    (128, 1152, 13),
    (64, 320, 7),
    (256, 640, 9),
)
TRAINING = ((64, 640, 9), (128, 640, 9))


def bound_ms(spec: BlockSpec, size: Size, dtype: torch.dtype, batch: int = 2) -> float:
    """The least that a block can take: to move tokens and weights, or to compute, at full rate."""
    tokens = batch * size[0] * size[1]
    moved = (2 * tokens * spec.dim + spec.num_parameters) * dtype.itemsize
    return 1000 * max(moved / BANDWIDTH, batch * block_flops(spec, size) / RATE)


def blocks(run: Run) -> None:
    for side, channels, K in run.pick(FORWARD, ((4, 32, 3),)):
        for dtype in run.pick(HALF_DTYPES, (torch.float32,)):
            if dtype == torch.bfloat16 and (channels // 4, K) not in timed_kernels(run):
                continue  # not compiled
            about = f"{side}² C{channels} K{K} {NAMES[dtype]}"
            run.cases(about, partial(block_cases, run, about, BlockSpec(channels, K), side, dtype))


def block_cases(run: Run, about: str, spec: BlockSpec, side: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, side * side, spec.dim, device=run.device).to(dtype)
    for name in (*(n for n in choose.NAMES if n != "reference"), "attention"):
        if name != "attention" or side <= 128:
            run.case(f"{about} {name}", partial(block_row, run, spec, (side, side), x, name))


def layer(run: Run, spec: BlockSpec, dtype: torch.dtype, name: str) -> tuple[nn.Module, Any]:
    """A module, and a function that makes the context in which it runs by this method."""
    if name == "attention":
        heads = max(1, spec.dim // 64)
        backends = run.pick(SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
        return bench.SelfAttention(spec.dim, heads, run.device, dtype), partial(sdpa_kernel, backends)
    return DeltaConvBlock(spec, run.device, dtype), partial(choose.forced, name)


def block_row(run: Run, spec: BlockSpec, size: Size, x: Tensor, name: str) -> Row:
    module, context = layer(run, spec, x.dtype, name)
    row: Row = {"bound_ms": bound_ms(spec, size, x.dtype, len(x))}
    with torch.inference_mode(), context():

        def call() -> Tensor:
            y: Tensor = module(x, size)
            return y

        for _ in range(run.pick(3, 1)):
            call()
        bench.synchronize(run.device)
        row["host_ms"] = host_ms(call, run.device, run.pick(200, 1))
        row["eager_ms"] = wall_ms(call, run.device, run.pick(20, 1))
        calls = run.pick(5, 1)
        replay = graphed(each([call] * calls), run.device)
        row["graph_ms"] = elapsed(replay, run.device, run.pick(7, 1)) / calls
    return row


def training(run: Run) -> None:
    for side, channels, K in run.pick(TRAINING, ((2, 16, 3),)):
        for dtype in run.pick(HALF_DTYPES, (torch.float32,)):
            for name in ("triton", "torch", "attention"):
                case = f"{side}² C{channels} K{K} {NAMES[dtype]} {name}"
                run.case(case, partial(training_row, run, BlockSpec(channels, K), side, dtype, name))


def training_row(run: Run, spec: BlockSpec, side: int, dtype: torch.dtype, name: str) -> Row:
    module, context = layer(run, spec, dtype, name)
    x = torch.randn(2, side * side, spec.dim, device=run.device).to(dtype).requires_grad_()
    upstream = torch.randn_like(x)

    def step() -> None:
        module(x, (side, side)).backward(upstream)
        x.grad = None
        module.zero_grad(set_to_none=True)

    with context(), only(1):  # one configuration: few kernels to compile
        for _ in range(run.pick(2, 0)):
            step()
        return {"wall_ms": wall_ms(step, run.device, run.pick(10, 1))}


# ---- 6: models ----


SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD15: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
TINY: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
}
TINY_XL = TINY | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}
MODELS = (("sdxl 1024²", SDXL, TINY_XL, 128), ("sd15 1024²", SD15, TINY, 128), ("sd15 512²", SD15, TINY, 64))
STATES = ("attention", "ΔConv", "attn1 off", "hybrid")


def models(run: Run) -> None:
    for name, full, tiny, side in MODELS:
        if any(f"{name} {state}" not in run.known for state in (*STATES, "in turns")):
            run.cases(name, partial(model_cases, run, name, run.pick(full, tiny), run.pick(side, 8)))
        gc.collect()
        if not run.tiny:
            torch.cuda.empty_cache()


def model_cases(run: Run, name: str, config: dict[str, Any], side: int) -> None:
    unet = make_unet(run, config)
    call = partial(forward, unet, inputs(run, unet, 2, (side, side)))
    replays: dict[str, Callable[[], object]] = {}
    held: list[Any] = []  # what graphs read must stay where it is
    for state in STATES:
        run.case(f"{name} {state}", partial(model_row, run, unet, state, call, replays, held))
    run.case(f"{name} in turns", partial(in_turns, run, replays))


def make_unet(run: Run, config: dict[str, Any]) -> Any:
    from diffusers import UNet2DConditionModel

    before = torch.get_default_dtype()
    torch.set_default_dtype(run.pick(torch.float16, torch.float32))
    try:
        with torch.device(run.device):
            return UNet2DConditionModel(**config).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)


def inputs(run: Run, unet: Any, batch: int, latent: Size) -> dict[str, Any]:
    config, dtype = unet.config, unet.dtype

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, device=run.device).to(dtype)

    given: dict[str, Any] = {
        "sample": noise(batch, 4, *latent),
        "timestep": torch.full((batch,), 500, device=run.device),
        "encoder_hidden_states": noise(batch, 77, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        ids = 6 * config.addition_time_embed_dim
        text = noise(batch, config.projection_class_embeddings_input_dim - ids)
        given["added_cond_kwargs"] = {"text_embeds": text, "time_ids": 64 * noise(batch, 6).abs()}
    return given


def forward(unet: Any, given: dict[str, Any]) -> Tensor:
    with torch.inference_mode():
        y: Tensor = unet(**given).sample
        return y


def model_row(
    run: Run, unet: Any, state: str, call: Callable[[], Tensor], replays: dict[str, Any], held: list[Any]
) -> Row:
    with in_state(run, unet, state):
        held.append(list(unet.modules()))
        begun = time.time()
        y = call()
        bench.synchronize(run.device)
        row: Row = {"first_s": time.time() - begun, "finite": bool(y.isfinite().all())}
        del y
        call()
        if not run.tiny:
            torch.cuda.reset_peak_memory_stats()
        row["eager_ms"] = statistics.median(wall_ms(call, run.device, 1) for _ in range(run.pick(10, 1)))
        row["host_ms"] = host_ms_of_one(call, run.device, run.pick(3, 1))
        if not run.tiny:
            row["peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
        if state == "hybrid":  # solves equations, which is not known to go into a graph
            return row
        try:
            replay = graphed(call, run.device)
            row["graph_ms"] = elapsed(replay, run.device, run.pick(10, 1))
            replays[state] = replay
        except NotCaptured as error:
            row |= {"graph": str(error)[:300], "broken": True}
    return row


def host_ms_of_one(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Milliseconds until one call is queued. (Where its queue is full, the host waits.)"""
    taken = []
    for _ in range(rounds):
        bench.synchronize(device)
        begun = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begun)
    bench.synchronize(device)
    return 1000 * statistics.median(taken)


def in_turns(run: Run, replays: dict[str, Callable[[], object]]) -> Row:
    """The graphs one after another, so that the clock of the GPU is the same for all."""
    taken: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(run.pick(10, 1)):
        for name, replay in replays.items():
            taken[name].append(elapsed(replay, run.device, 1))
    row: Row = {f"{name} ms": statistics.median(times) for name, times in taken.items()}
    off = row.get("attn1 off ms")
    if off:
        row |= {f"{name}/off": row[f"{name} ms"] / off for name in replays if name != "attn1 off"}
    return row


@contextmanager
def in_state(run: Run, unet: Any, state: str) -> Iterator[None]:
    """The U-Net with what stands in for its self-attention."""
    if state == "attention":
        yield
        return
    from deltaconv_core.diffusers.sites import find_sites

    found = find_sites(unet)
    if state == "attn1 off":
        # The residual alone would do; it costs an addition that is there in the other states too.
        for attention in found.attentions.values():
            attention.__dict__["forward"] = lambda hidden_states, *_, **__: hidden_states
        try:
            yield
        finally:
            for attention in found.attentions.values():
                del attention.__dict__["forward"]
        return
    from deltaconv_core import diffusers as adapter
    from deltaconv_core.weights.checkpoint import Checkpoint

    made = made_blocks(run, unet, found, state)
    adapter.apply(unet, Checkpoint(found.architecture, made))
    try:
        yield
    finally:
        adapter.remove(unet)


def made_blocks(run: Run, unet: Any, found: Any, state: str) -> dict[str, nn.Module]:
    from deltaconv_core.mixers.hybrid import HybridMixer, HybridSpec
    from deltaconv_core.sites import authors_specs

    if state == "hybrid":
        heads = {site: int(attention.heads) for site, attention in found.attentions.items()}
        return {
            site: HybridMixer(HybridSpec(channels, heads[site], channels // heads[site]), run.device)
            for site, channels in found.channels.items()
        }
    known = {} if run.tiny else authors_specs(found.architecture)
    return {
        site: DeltaConvBlock(known.get(site, BlockSpec(channels, 3)), run.device, unet.dtype)
        for site, channels in found.channels.items()
    }


# ---- 7: 16K ----


def large(run: Run) -> None:
    latent = run.pick((1080, 1920), (6, 10))
    for channels, K in run.pick(((320, 7), (640, 9)), ((32, 3),)):
        for name in ("triton", "torch"):
            case = f"{latent[0]}x{latent[1]} C{channels} K{K} {name}"
            run.case(case, partial(large_block, run, latent, BlockSpec(channels, K), name))


def large_block(run: Run, latent: Size, spec: BlockSpec, name: str) -> Row:
    dtype = run.pick(torch.float16, torch.float32)
    module, context = layer(run, spec, dtype, name)
    x = torch.randn(1, latent[0] * latent[1], spec.dim, device=run.device, dtype=dtype)
    row: Row = {"bound_ms": bound_ms(spec, latent, dtype, 1)}
    with torch.inference_mode(), context():
        module(x, latent)
        if not run.tiny:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        row["ms"] = elapsed(lambda: module(x, latent), run.device, run.pick(3, 1))
        if not run.tiny:
            row["peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
    return row


def large_model(run: Run) -> None:
    latent = run.pick((1080, 1920), (8, 12))

    def measure(state: str) -> Row:
        unet = make_unet(run, run.pick(SD15, TINY))
        call = partial(forward, unet, inputs(run, unet, 1, latent))
        with in_state(run, unet, state):
            begun = time.time()
            call()
            bench.synchronize(run.device)
            row: Row = {"first_s": time.time() - begun}
            if not run.tiny:
                torch.cuda.reset_peak_memory_stats()
            row["s"] = elapsed(call, run.device, run.pick(2, 1)) / 1000
            if not run.tiny:
                row["peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
        return row

    for state in ("ΔConv", "attn1 off"):
        run.case(f"sd15 {latent[0]}x{latent[1]} {state}", partial(measure, state))


# ---- 8: what limits the kernels ----


SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "WarpStateStats", "LaunchStats", "Occupancy")
WANTED = (
    "Duration",
    "Compute (SM) Throughput",
    "Memory Throughput",
    "DRAM Throughput",
    "L1/TEX Cache Throughput",
    "L2 Cache Throughput",
    "Issue Slots Busy",
    "Executed Ipc Active",
    "Registers Per Thread",
    "Achieved Occupancy",
    "SM Frequency",
)


def profile(run: Run) -> None:
    for which in run.pick(("depthwise", "tensor cores", "project"), ("depthwise",)):
        run.case(which, partial(profiled, run, which))


def profiled(run: Run, which: str) -> Row:
    target = [sys.executable, "-m", "benchmarks.gpu_steps", f"once {which}", str(run.output)]
    if run.tiny:
        line = [*target, "--cpu"]
    else:
        sections = [part for section in SECTIONS for part in ("--section", section)]
        names = "regex:depthwise|_project"
        line = ["ncu", "--clock-control", "none", "--csv", "-k", names, "-c", "2", *sections, *target]
    left = max(1.0, run.until - time.time())
    done = subprocess.run(
        line, input=f"{run.until}\n", capture_output=True, text=True, timeout=left, check=False
    )
    if done.returncode:
        raise RuntimeError(f"status {done.returncode}: {(done.stdout + done.stderr)[-500:]}")
    if run.tiny:
        return {"metrics": "no GPU"}
    text = done.stdout[done.stdout.find('"ID"') :]
    row: Row = {}
    for entry in csv.DictReader(io.StringIO(text)):
        kernel, metric = str(entry.get("Kernel Name"))[:24], entry.get("Metric Name")
        if metric in WANTED:
            row[f"{kernel} {metric}"] = f"{entry.get('Metric Value')} {entry.get('Metric Unit')}"
    return row or {"ok": False, "error": f"ncu printed no metrics: {done.stdout[-300:]}"}


def once(which: str, run: Run) -> None:
    """One launch of a kernel at 128² and C 640, for a profiler."""
    side, half, K, dtype = run.pick((128, 160, 9, torch.bfloat16), (6, 16, 3, torch.float32))
    u = torch.randn(2, side, side, 2 * half, device=run.device).to(dtype)
    weight = (torch.randn(2 * half, 1, K, K, device=run.device) / K).to(dtype)
    with only(0):
        if which == "depthwise":
            triton_backend().depthwise_gate(u, weight, None, "simple")
        elif which == "project":
            g = u[..., :half].contiguous()
            matrix = torch.randn(4 * half, half, device=run.device).to(dtype)
            bias = matrix.new_zeros(2, 1, 4 * half)
            triton_backend().project([g], matrix, bias, (side, side), "concat")
        else:
            call = tensor_cores(u.permute(0, 3, 1, 2).contiguous(), weight)
            if isinstance(call, str):
                raise RuntimeError(call)
            call()
    bench.synchronize(run.device)


STEPS: dict[str, Callable[[Run], None]] = {
    "machine": machine,
    "compile": compile_all,
    "check": check,
    "kernels": kernels,
    "blocks": blocks,
    "models": models,
    "training": training,
    "large": large,
    "large-model": large_model,
    "profile": profile,
    **{f"once {which}": partial(once, which) for which in ("depthwise", "tensor cores", "project")},
}


if __name__ == "__main__":
    sys.exit(main())
