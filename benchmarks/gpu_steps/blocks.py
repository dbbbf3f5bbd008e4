"""The steps `blocks` and `training`: ΔConv by each backend, and flash attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from deltaconv_core import BlockSpec, DeltaConvBlock, bench
from deltaconv_core.block.flops import block_flops
from deltaconv_core.block.ops import choose

from ..gpu import Row
from .kernels import timed_kernels
from .run import BANDWIDTH, HALF_DTYPES, NAMES, RATE, Run, Size, each, elapsed, graphed, host_ms, wall_ms
from .tiles import only, why_not_on_tensor_cores

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
    if name == "cuda" and (why := why_not_on_tensor_cores(x, size, spec.kernel_size)):
        return {"why_not": why}
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
