"""Bilinear interpolation, corners not aligned: where a position reads from, and the adjoint as a kernel."""

import triton
import triton.language as tl
from torch import Tensor

from ..backend import Size
from ..operators import operator
from .launch import LaunchArguments, too_many, turns
from .tuning import RESAMPLE, bucket, tuned


@triton.jit
def taps(position, ratio, size):
    """The two entries (of `size`) that a position on the larger side reads, and the share of the second.

    `ratio` is smaller side / larger side, a float32.
    """
    place = tl.maximum((position + 0.5) * ratio - 0.5, 0.0)
    low = tl.minimum(place.to(tl.int32), size - 1)
    return low, tl.minimum(low + 1, size - 1), place - low.to(tl.float32)


@tuned(RESAMPLE, {"COLS": 16, "CHANNELS": 128}, key=["C", "SIZE"])
@triton.jit(do_not_specialize=["H", "W", "h", "w", "window", "SIZE"])
def _adjoint(
    source, out, H, W, h, w, row_ratio, col_ratio, window, C, SIZE,
    COLS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out (B, h, w, C) [p, q] = sum of source (B, H, W, C) [y, x] times what [p, q] counts in [y, x]."""
    tiles = tl.cdiv(w, COLS)
    p = tl.program_id(0) // tiles
    q = tl.program_id(0) % tiles * COLS + tl.arange(0, COLS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    inside = (q < w) & (channel < C)
    image = tl.program_id(2).to(tl.int64)
    # Positions that read entry p lie between (p - 1/2) H/h - 1/2 and (p + 3/2) H/h - 1/2; at the borders too.
    first = tl.maximum((2 * p - 1) * H // (2 * h), 0)
    end = tl.minimum((2 * p + 3) * H // (2 * h) + 1, H)
    first_col = tl.maximum((2 * q - 1) * W // (2 * w), 0)
    total = tl.zeros([COLS, CHANNELS], dtype=tl.float32)
    for y in range(first, end):
        low, high, share = taps(y, row_ratio, h)
        row_weight = tl.where(low == p, 1 - share, 0.0) + tl.where(high == p, share, 0.0)
        line = source + (image * H + y) * W * C
        for k in range(window):
            x = first_col + k
            low_col, high_col, col_share = taps(x, col_ratio, w)
            weight = tl.where(low_col == q, 1 - col_share, 0.0) + tl.where(high_col == q, col_share, 0.0)
            value = tl.load(line + x * C + channel, mask=inside & (x < W), other=0.0).to(tl.float32)
            total += value * (weight * row_weight)
    tl.store(out + ((image * h + p) * w + q) * C + channel, total.to(out.dtype.element_ty), mask=inside)


def _smaller(y: Tensor, height: int, width: int) -> Tensor:
    return y.new_empty(y.shape[0], height, width, y.shape[3])


@operator("enlarge_adjoint", "(Tensor y, SymInt height, SymInt width) -> Tensor", _smaller)
def _enlarge_adjoint(y: Tensor, height: int, width: int) -> Tensor:
    out = _smaller(y, height, width)
    for some, some_out in turns(y.contiguous(), out) if too_many(y) else [(y.contiguous(), out)]:
        _launch(some, some_out)
    return out


def _launch(y: Tensor, out: Tensor) -> None:
    """Launches `_adjoint`."""
    height, width = out.shape[1:3]
    batch, H, W, C = y.shape

    def call() -> LaunchArguments:
        def grid(tile: dict[str, int]) -> tuple[int, ...]:
            return height * triton.cdiv(width, tile["COLS"]), triton.cdiv(C, tile["CHANNELS"]), batch

        window = -(-2 * W // width) + 2
        numbers = H, W, height, width, height / H, width / W, window, C, bucket(batch * H * W)
        return LaunchArguments(grid, numbers, {})

    _adjoint.launch((y.shape, height, width, y.dtype, y.device), (y, out), call)


def enlarge_adjoint(y: Tensor, size: Size) -> Tensor:
    """The gradient (B, *size, C) of what interpolation enlarged, from that of the result (B, H, W, C)."""
    result: Tensor = _enlarge_adjoint(y, *size)
    return result
