"""The step `compile`: all kernels that are timed, in many processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch

from deltaconv_core import BlockSpec, bench

from ..gpu import Row
from .blocks import training_row
from .kernels import timed_kernels
from .run import HALF_DTYPES, NAMES, Run, in_parallel
from .tiles import only, tensor_cores, triton_backend

TRITON = "deltaconv_core.block.ops.triton"


def compile_all(run: Run) -> None:
    jobs: dict[str, Callable[[], Row]] = {}
    sizes = dict.fromkeys(
        [*timed_kernels(run), *((spec.inter // 2, spec.kernel_size) for spec in specs(run))]
    )
    timed = set(timed_kernels(run))
    for dtype in run.pick(HALF_DTYPES, (torch.float32,)):
        for planes in (False, True):
            name = f"project {NAMES[dtype]}{' of planes' if planes else ''}"
            jobs[name] = partial(compile_project, run, dtype, planes)
        jobs[f"pool {NAMES[dtype]}"] = partial(compile_pool, run, dtype)
        jobs[f"mean and taps {NAMES[dtype]}"] = partial(compile_mean, run, dtype)
    for half, K in sorted(sizes, key=lambda size: -size[1]):  # what takes longest first
        for dtype in run.pick(HALF_DTYPES, (torch.float32,)):
            if (half, K) in timed or dtype != torch.bfloat16:
                name = f"depthwise {NAMES[dtype]} half {half} K{K}"
                jobs[name] = partial(compile_depthwise, run, dtype, half, K)
    for dtype in run.pick(HALF_DTYPES, ()):
        jobs[f"training {NAMES[dtype]}"] = partial(training_row, run, BlockSpec(640, 9), 8, dtype, "triton")
    for dtype in HALF_DTYPES:
        for K in run.pick((3, 5, 7, 9, 11, 13), ()):
            jobs[f"tensor cores {NAMES[dtype]} K{K}"] = partial(compile_tensor_cores, run, dtype, K)
    in_parallel(run, list(jobs.items()))


def specs(run: Run) -> list[BlockSpec]:
    """Distinct blocks of the models and of the blocks that are timed."""
    from deltaconv_core.sites import authors_specs

    if run.tiny:
        return [BlockSpec(32, 3)]
    return list(dict.fromkeys([*authors_specs("sdxl").values(), *authors_specs("sd15").values()]))


def compile_depthwise(run: Run, dtype: torch.dtype, half: int, K: int) -> Row:
    u = torch.randn(2, 8, 8, 2 * half, device=run.device).to(dtype)
    weight = torch.randn(2 * half, 1, K, K, device=run.device).to(dtype)
    with only(0):
        triton_backend().depthwise_gate(u, weight, None, "simple")
    bench.synchronize(run.device)
    return {}


def compile_project(run: Run, dtype: torch.dtype, planes: bool) -> Row:
    stage = torch.float32 if dtype == torch.float16 else dtype
    stages = [torch.randn(2, side, side, 160, device=run.device).to(stage) for side in (8, 4)]
    if planes:
        stages = [g.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for g in stages]
    weight = torch.randn(640, 320, device=run.device).to(dtype)
    with only(0):
        triton_backend().project(stages, weight, weight.new_zeros(2, 1, 640), (8, 8), "concat")
    bench.synchronize(run.device)
    return {}


def compile_pool(run: Run, dtype: torch.dtype) -> Row:
    with only(0):
        triton_backend().shrink(torch.randn(2, 8, 8, 320, device=run.device).to(dtype), 0.5, "average")
    bench.synchronize(run.device)
    return {}


def compile_mean(run: Run, dtype: torch.dtype) -> Row:
    x, weight = (torch.randn(*shape, device=run.device).to(dtype) for shape in ((2, 64, 640), (640, 640)))
    taps = torch.randn(320, 1, 3, 3, device=run.device).to(dtype)
    with only(0):
        import_module(f"{TRITON}.mean").mean_product(x, weight, weight[0], weight[0])
        import_module(f"{TRITON}.depthwise_gate").transposed([taps, taps])
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
