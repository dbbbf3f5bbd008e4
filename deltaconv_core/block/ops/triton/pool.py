"""Adaptive average pooling of (B, H, W, c) and its adjoint."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..backend import Size
from ..operators import operator
from .launch import LaunchArguments, too_many, turns
from .tuning import RESAMPLE, bucket, tuned


@tuned(RESAMPLE, {"COLS": 16, "CHANNELS": 128}, key=["C", "SIZE"])
@triton.jit(do_not_specialize=["H", "W", "out_H", "out_W", "window", "SIZE"])
def _pool(
    source, out, H, W, out_H, out_W, window, C, SIZE,
    ADJOINT: tl.constexpr, COLS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Entry i of `out` sums the entries floor(i H / out_H) to ceil((i + 1) H / out_H) - 1 of `source`.

    In pooling they are divided by their number. In the adjoint, where `source` is the smaller one, the same
    formula gives the windows that an entry of `out` lies in, and each is divided by its number of entries.
    """
    tiles = tl.cdiv(out_W, COLS)
    i = tl.program_id(0) // tiles
    j = tl.program_id(0) % tiles * COLS + tl.arange(0, COLS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    inside = (j < out_W) & (channel < C)
    image = tl.program_id(2).to(tl.int64)
    row = i * H // out_H
    end_row = ((i + 1) * H + out_H - 1) // out_H
    col = j * W // out_W
    end_col = ((j + 1) * W + out_W - 1) // out_W
    total = tl.zeros([COLS, CHANNELS], dtype=tl.float32)
    for y in range(row, end_row):
        line = source + (image * H + y) * W * C
        y_count = ((y + 1) * out_H + H - 1) // H - y * out_H // H
        for k in range(window):
            x = col + k
            value = tl.load(line + x * C + channel, mask=inside & (x < end_col), other=0.0).to(tl.float32)
            if ADJOINT:
                x_count = ((x + 1) * out_W + W - 1) // W - x * out_W // W
                value = value / (x_count * y_count).to(tl.float32)
            total += value
    if not ADJOINT:
        total = total / ((end_row - row) * (end_col - col)).to(tl.float32)
    tl.store(
        out + ((image * out_H + i) * out_W + j) * C + channel, total.to(out.dtype.element_ty), mask=inside
    )


def _empty(x: Tensor, height: int, width: int, adjoint: bool) -> Tensor:
    return x.new_empty(x.shape[0], height, width, x.shape[3])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, _, ctx.adjoint = inputs
    ctx.size = x.shape[1:3]


def _backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    return resize(upstream, *ctx.size, not ctx.adjoint), None, None, None


@operator(
    "pool", "(Tensor x, SymInt height, SymInt width, bool adjoint) -> Tensor", _empty, _backward, _remember
)
def resize(x: Tensor, height: int, width: int, adjoint: bool) -> Tensor:
    out = _empty(x, height, width, adjoint)
    for some, some_out in turns(x.contiguous(), out) if too_many(x) else [(x.contiguous(), out)]:
        _launch(some, some_out, adjoint)
    return out


def _launch(x: Tensor, out: Tensor, adjoint: bool) -> None:
    """Launches `_pool`."""
    height, width = out.shape[1:3]
    batch, H, W, C = x.shape

    def call() -> LaunchArguments:
        def grid(tile: dict[str, int]) -> tuple[int, ...]:
            return height * triton.cdiv(width, tile["COLS"]), triton.cdiv(C, tile["CHANNELS"]), batch

        window = W // width + (2 if W % width else 0)
        numbers = H, W, height, width, window, C, bucket(batch * height * width)
        return LaunchArguments(grid, numbers, {"ADJOINT": adjoint})

    _pool.launch((x.shape, height, width, x.dtype, adjoint, x.device), (x, out), call)


def average(x: Tensor, size: Size) -> Tensor:
    """(B, H, W, c) -> (B, *size, c): `torch.nn.functional.adaptive_avg_pool2d` over channels-last memory."""
    result: Tensor = resize(x, *size, False)
    return result
