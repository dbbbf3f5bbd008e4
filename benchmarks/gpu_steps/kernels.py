"""The step `kernels`: each kernel alone, in each configuration."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from deltaconv_core.block.ops import by_torch
from deltaconv_core.block.ops.by_torch import TorchBackend
from testing.compare import relative_l2

from ..gpu import Row
from .run import BANDWIDTH, HALF_DTYPES, NAMES, RATE, Run, cold_and_warm
from .tiles import configurations, tensor_cores, triton_backend


def timed_kernels(run: Run) -> list[tuple[int, int]]:
    """(half of the inner channels, K) of the kernels that are timed alone."""
    return [(channels // 4, K) for channels in run.pick((640, 1152), (32,)) for K in run.pick((9, 13), (3,))]


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
