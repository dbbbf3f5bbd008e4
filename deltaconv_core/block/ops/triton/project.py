"""The output projection: enlarged stages, joined, times a matrix, plus a bias for each image.

Interpolation acts on positions and the matrix on channels, so they commute: a stage of the full size is
multiplied as it is, each smaller one is multiplied at its own size, and the kernel that multiplies the first
interpolates the products of the others as it writes. Neither an enlarged stage nor the concatenation exists,
and a stage of half the size costs a quarter. The backward pass does the same in the other direction: the
adjoint of interpolation (a kernel) shrinks the gradient once for each smaller stage; the matrix products are
PyTorch's.

float16: stages are float32 there. NVIDIA's GPUs multiply tf32, which has float16's precision and float32's
range; the product takes twice as long as in float16, and everything around it half as long. AMD's multiply
float16: a row is divided by a power of two before it is rounded, and its sum multiplied by it: the largest so
far, as in a running softmax.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....util.precision import tf32_allowed
from ..backend import Size
from ..by_torch import enlarge
from ..operators import operator
from .enlarge import enlarge_adjoint, taps
from .launch import LaunchArguments, dtypes, too_many, turns
from .tuning import INTERPRETED, PROJECT, bucket, tuned

LARGEST = 2.0**15  # entry given to a float16 product
AT_ONCE = 2  # smaller stages that one launch adds


@triton.jit
def _enlarged(source, image, y, x, h, w, row_ratio, col_ratio, channel, C, mask):
    """Bilinear samples of source (B, h, w, C) for positions y, x of one image: (positions, channels)."""
    top, bottom, row_share = taps(y, row_ratio, h)
    left, right, col_share = taps(x, col_ratio, w)
    upper = (image * h + top) * w
    lower = (image * h + bottom) * w
    source += channel[None, :]
    upper_left = tl.load(source + (upper + left)[:, None] * C, mask=mask, other=0.0).to(tl.float32)
    upper_right = tl.load(source + (upper + right)[:, None] * C, mask=mask, other=0.0).to(tl.float32)
    lower_left = tl.load(source + (lower + left)[:, None] * C, mask=mask, other=0.0).to(tl.float32)
    lower_right = tl.load(source + (lower + right)[:, None] * C, mask=mask, other=0.0).to(tl.float32)
    above = upper_left + (upper_right - upper_left) * col_share[:, None]
    below = lower_left + (lower_right - lower_left) * col_share[:, None]
    return above + (below - above) * row_share[:, None]


@triton.jit
def _nearest_tf32(a):
    """The bits of float32 numbers whose last 13 bits may be cut off. The minimum keeps NaN what it is."""
    return tl.minimum(a.to(tl.float32).to(tl.int32, bitcast=True), 0x7FFFE000) + 0x1000


@tuned(PROJECT, {"ROWS": 128, "COLUMNS": 128, "DEPTH": 32}, key=["C", "CHANNELS", "SIZE", "SMALLER"])
@triton.jit(do_not_specialize=["N", "W", "first_h", "first_w", "second_h", "second_w", "SIZE"])
def _project(
    stage, weight, bias, first, second, out, N, W, C, CHANNELS, weight_stride,
    first_h, first_w, first_rows, first_cols, second_h, second_w, second_rows, second_cols, SIZE,
    HAS_STAGE: tl.constexpr, HAS_BIAS: tl.constexpr, SMALLER: tl.constexpr, HALF: tl.constexpr,
    LARGEST: tl.constexpr, TF32: tl.constexpr, WIDE: tl.constexpr, FLOAT32: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out (B, N, C) = stage (B, N, CHANNELS) @ weight (C, CHANNELS).T + bias (B, C) + SMALLER enlarged ones.

    A float32 stage and a float16 weight are multiplied in float16 (HALF) or in tf32 (TF32). WIDE: for the
    interpreter, which neither multiplies bfloat16 nor cuts off what tf32 has not. PLANES: the stage is
    (B, CHANNELS, N).
    """
    tiles = tl.cdiv(C, COLUMNS)
    position = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    image = tl.program_id(1).to(tl.int64)
    mask = (position < N)[:, None] & (column < C)[None, :]
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    if HAS_STAGE:
        if PLANES:
            line = stage + image * N * CHANNELS + position[:, None]
        else:
            line = stage + (image * N + position)[:, None] * CHANNELS
        scale = tl.full([ROWS], 1.0, dtype=tl.float32)
        for start in range(0, CHANNELS, DEPTH):
            depth = start + tl.arange(0, DEPTH)
            within = (depth < CHANNELS)[None, :]
            along = depth.to(tl.int64) * N if PLANES else depth
            a = tl.load(line + along[None, :], mask=(position < N)[:, None] & within, other=0.0)
            b = tl.load(
                weight + column[:, None] * weight_stride + depth[None, :],
                mask=(column < C)[:, None] & within, other=0.0,
            )  # fmt: skip
            if HALF:
                a = a.to(tl.float32)
                needed = tl.exp2(tl.ceil(tl.log2(tl.maximum(tl.max(tl.abs(a), axis=1) / LARGEST, 1.0))))
                larger = tl.maximum(scale, needed)
                total = total * (scale / larger)[:, None]
                a = (a / larger[:, None]).to(tl.float16)
                scale = larger
            if TF32:
                bits = _nearest_tf32(a)
                if WIDE:
                    bits = bits & -0x2000
                a = bits.to(tl.float32, bitcast=True)
                b = b.to(tl.float32)
            elif WIDE:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            total = tl.dot(a, tl.trans(b), total, input_precision=FLOAT32)
        if HALF:
            total = total * scale[:, None]
    if HAS_BIAS:
        total += tl.load(bias + image * C + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
    y, x = position // W, position % W
    if SMALLER > 0:
        total += _enlarged(first, image, y, x, first_h, first_w, first_rows, first_cols, column, C, mask)
    if SMALLER > 1:
        total += _enlarged(second, image, y, x, second_h, second_w, second_rows, second_cols, column, C, mask)
    place = (image * N + position)[:, None] * C + column[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)


def _multiply(
    stage: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    smaller: Sequence[Tensor],
    out: Tensor,
    size: Size,
) -> Tensor:
    """Launches `_project`: out (B, size[0] * size[1], C) or (B, *size, C), smaller (B, h, w, C) each."""
    if too_many(out):
        for some, some_bias, some_out, *some_smaller in turns(stage, bias, out, *smaller):
            _multiply(some, weight, some_bias, some_smaller, some_out, size)
        return out
    batch, C, positions = out.shape[0], out.shape[-1], size[0] * size[1]
    half, tf32 = weight.dtype == torch.float16, torch.version.hip is None
    precision = "tf32" if half and tf32 else float32_products() if weight.dtype == torch.float32 else "ieee"
    planes = stage is not None and not stage.is_contiguous()

    def call() -> LaunchArguments:
        def grid(tile: dict[str, int]) -> tuple[int, ...]:
            return triton.cdiv(positions, tile["ROWS"]) * triton.cdiv(C, tile["COLUMNS"]), batch

        height, width = size
        shapes = [(*s.shape[1:3], s.shape[1] / height, s.shape[2] / width) for s in smaller]
        first, second = [*shapes, *[(1, 1, 1.0, 1.0)] * AT_ONCE][:AT_ONCE]
        depth = 1 if stage is None else stage.shape[3]
        numbers = positions, width, C, depth, weight.stride(0), *first, *second, bucket(batch * positions)
        return LaunchArguments(grid, numbers, {
            "HAS_STAGE": stage is not None, "HAS_BIAS": bias is not None, "SMALLER": len(smaller),
            "HALF": half and not tf32, "LARGEST": LARGEST, "TF32": half and tf32,
            "WIDE": INTERPRETED and weight.dtype != torch.float32, "FLOAT32": precision,
            "PLANES": planes,
        })  # fmt: skip

    absent = (out,) * (AT_ONCE - len(smaller))
    tensors = out if stage is None else stage, weight, out if bias is None else bias, *smaller, *absent, out
    key = (
        batch, C, size, None if stage is None else stage.shape, *[s.shape for s in smaller], *dtypes(tensors),
        bias is None, weight.stride(0), precision, planes, out.device,
    )  # fmt: skip
    _project.launch(key, tensors, call)
    return out


def float32_products() -> str:
    """How float32 is multiplied: as PyTorch is told to."""
    return "tf32" if tf32_allowed() else "ieee"


def _readable(stage: Tensor) -> Tensor:
    """(B, h, w, c) as it is where it, or (B, c, h, w) of which it is a view, is contiguous; else a copy."""
    return stage if stage.permute(0, 3, 1, 2).is_contiguous() else stage.contiguous()


def _parts(weight: Tensor, stages: Sequence[Tensor], concat: bool) -> list[Tensor]:
    """What each stage is multiplied by: (C, c / 2) each."""
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    return list(weight.chunk(len(stages), dim=1)) if concat else [weight] * len(stages)


def _empty(
    stages: list[Tensor], weight: Tensor, bias: Tensor, height: int, width: int, concat: bool
) -> Tensor:
    return weight.new_empty(stages[0].shape[0], height * width, weight.shape[0])


def _flops(stages: Sequence[Sequence[int]], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * weight[0] * sum(map(math.prod, stages))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    stages, weight, bias, ctx.height, ctx.width, ctx.concat = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(weight, *stages)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    weight, *stages = ctx.saved_tensors
    of_stages, of_weight, of_bias = ctx.needs_input_grad[:3]
    grid = upstream.reshape(len(upstream), ctx.height, ctx.width, -1)
    stage_gradients: list[Tensor | None] = []
    weight_gradients = []
    for stage, part, wanted in zip(stages, _parts(weight, stages, ctx.concat), of_stages, strict=True):
        size = stage.shape[1], stage.shape[2]
        y = grid if size == (ctx.height, ctx.width) else enlarge_adjoint(grid, size)
        stage_gradients.append((y @ part).to(stage.dtype) if wanted else None)
        if of_weight:
            weight_gradients.append(_outer(y.flatten(0, 2), stage.flatten(0, 2)))
    joined = _joined(weight_gradients, ctx.concat).to(weight.dtype) if of_weight else None
    total = upstream.sum(1, keepdim=True, dtype=torch.float32).to(ctx.bias_dtype) if of_bias else None
    return stage_gradients, joined, total, None, None, None


def _outer(y: Tensor, stage: Tensor) -> Tensor:
    """(N, C), (N, c / 2) -> (C, c / 2), the sum over N; float32 beside float16 is scaled into its range."""
    if stage.dtype == y.dtype:
        return y.t() @ stage
    scale = torch.exp2(torch.log2(stage.abs().amax() / LARGEST).ceil().clamp(min=0))
    return (y.t() @ (stage / scale).to(y.dtype)).float() * scale


def _joined(gradients: list[Tensor], concat: bool) -> Tensor:
    return torch.cat(gradients, dim=1) if concat else torch.stack(gradients).sum(0)


@operator(
    "project",
    "(Tensor[] stages, Tensor weight, Tensor bias, SymInt height, SymInt width, bool concat) -> Tensor",
    _empty,
    _backward,
    _remember,
    _flops,
)
def project_stages(
    stages: list[Tensor], weight: Tensor, bias: Tensor, height: int, width: int, concat: bool
) -> Tensor:
    expected = (len(stages[0]), 1, len(weight))
    if bias.shape != expected:  # the kernel would read beyond it
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be (B, 1, C), here {expected}")
    first: Tensor | None = None
    first_part = weight
    smaller = []
    for stage, part in zip(stages, _parts(weight, stages, concat), strict=True):
        size = stage.shape[1], stage.shape[2]
        if first is None and size == (height, width):
            first, first_part = _readable(stage), part
            continue
        out = stage.new_empty(len(stage), *size, len(part))
        smaller.append(_multiply(_readable(stage), part, None, (), out, size))
    out = _empty(stages, weight, bias, height, width, concat)
    _multiply(first, first_part, bias.contiguous(), smaller[:AT_ONCE], out, (height, width))
    for product in smaller[AT_ONCE:]:
        out += enlarge(product.permute(0, 3, 1, 2), (height, width)).flatten(2).transpose(1, 2)
    return out


def project(stages: Sequence[Tensor], weight: Tensor, bias: Tensor, grid: Size, merge: str) -> Tensor:
    """See `ops.backends.Backend`; the result has weight's dtype, float16 too."""
    result: Tensor = project_stages(list(stages), weight, bias, *grid, merge == "concat")
    return result
