"""Depth-wise K x K convolution and gate as one kernel over (B, H, W, c), and its gradients.

A program computes ROWS x COLS positions of CHANNELS channels of the first half and of the same channels of
the second half, which the gate multiplies. It goes through the rows of the input that these positions see;
each value that it reads serves all ROWS sums at once, so that reading does not cost more than multiplying.

The backward pass keeps only u: one launch computes both halves again and passes the gradient through the
gate, a second one correlates that with the flipped weights, and another kernel sums the weights' gradient,
which is written in parts and added up in a fixed order.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators import operator
from .launch import LaunchArguments, dtypes, too_many, turns
from .tuning import DEPTHWISE, DEPTHWISE_WEIGHT, RESAMPLE, bucket, number_of_gpu, tuned

FORWARD, GRADIENT, PLAIN = 0, 1, 2  # what becomes of the two sums; kernels see the numbers
PROGRAMS = 2048  # of the kernel of the weights' gradient: enough for any GPU, few parts to add up


@tuned(DEPTHWISE, {"ROWS": 16, "COLS": 16, "CHANNELS": 64, "VECTOR": 2}, key=["K", "HALF", "SIZE", "STEP"])
@triton.jit(do_not_specialize=["H", "W", "SIZE"])
def _depthwise(
    u, weight, bias, upstream, out, H, W, factor, SIZE,
    HALF: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr, SIGMOID: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """u (B, H, W, 2 HALF), weight (K * K, 2 HALF).

    STEP 0 writes the gate of the two sums (B, H, W, HALF), 1 the gradients of the sums (B, H, W, 2 HALF) from
    that of the gate, 2 the sums themselves.
    """
    tiles = tl.cdiv(W, COLS)
    top = tl.program_id(0) // tiles * ROWS
    row = tl.arange(0, ROWS)[:, None, None]
    col = tl.program_id(0) % tiles * COLS + tl.arange(0, COLS)[None, :, None]
    channels = tl.max_contiguous(tl.arange(0, CHANNELS), VECTOR)
    channel = tl.program_id(1) * CHANNELS + channels[None, None, :]
    image = tl.program_id(2).to(tl.int64) * H * W
    a = tl.zeros([ROWS, COLS, CHANNELS], dtype=tl.float32)
    b = tl.zeros([ROWS, COLS, CHANNELS], dtype=tl.float32)

    for y in range(tl.maximum(top - K // 2, 0), tl.minimum(top + ROWS + K // 2, H)):
        # Pointers that differ from one tap to the next by constants only.
        line = u + (image + y * W) * (2 * HALF) + col * (2 * HALF) + channel
        dy = y - top + K // 2 - row  # the row of the window in which each row of the tile sees this one
        taps = weight + dy * (K * 2 * HALF) + channel
        used = (dy >= 0) & (dy < K)
        if HALF % CHANNELS:
            used = used & (channel < HALF)
        for dx in tl.static_range(K):
            here = line + (dx - K // 2) * (2 * HALF)
            tap = taps + dx * (2 * HALF)
            seen = (col + (dx - K // 2) >= 0) & (col + (dx - K // 2) < W)
            if HALF % CHANNELS:
                seen = seen & (channel < HALF)
            u_a = tl.load(here, mask=seen, other=0.0).to(tl.float32)
            u_b = tl.load(here + HALF, mask=seen, other=0.0).to(tl.float32)
            a += u_a * tl.load(tap, mask=used, other=0.0).to(tl.float32)
            b += u_b * tl.load(tap + HALF, mask=used, other=0.0).to(tl.float32)
    if HAS_BIAS:
        a += tl.load(bias + channel, mask=channel < HALF, other=0.0).to(tl.float32)
        b += tl.load(bias + HALF + channel, mask=channel < HALF, other=0.0).to(tl.float32)

    inside = (top + row < H) & (col < W) & (channel < HALF)
    place = image + (top + row) * W + col
    if STEP == 0:
        if SIGMOID:
            gated = a * tl.sigmoid(b)
        else:
            gated = a * (b * factor)
        tl.store(out + place * HALF + channel, gated.to(out.dtype.element_ty), mask=inside)
    else:
        if STEP == 1:
            g = tl.load(upstream + place * HALF + channel, mask=inside, other=0.0).to(tl.float32)
            if SIGMOID:
                s = tl.sigmoid(b)
                b = g * a * s * (1 - s)
                a = g * s
            else:
                g = g * factor
                grad_b = g * a
                a = g * b
                b = grad_b
        target = out + place * (2 * HALF) + channel
        tl.store(target, a.to(out.dtype.element_ty), mask=inside)
        tl.store(target + HALF, b.to(out.dtype.element_ty), mask=inside)


@tuned(DEPTHWISE_WEIGHT, {"COLS": 16, "CHANNELS": 128}, key=["K", "C", "SIZE", "GPU"])
@triton.jit(do_not_specialize=["H", "W", "rows", "SIZE", "GPU"])
def _weight_gradient(
    u, gradient, out, H, W, rows, C, SIZE, GPU,
    K: tl.constexpr, KERNEL_COLS: tl.constexpr, COLS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out (part, K, K, C): row dy of the weights' gradient from `rows` rows of one image.

    u, gradient: (B, H, W, C). KERNEL_COLS is K rounded up to a power of two.
    """
    parts = tl.cdiv(H, rows)
    part = tl.program_id(0)
    dy = tl.program_id(1)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)[None, None, :]
    dx = tl.arange(0, KERNEL_COLS)[:, None, None]
    lane = tl.arange(0, COLS)[None, :, None]
    line = tl.cast(W, tl.int64) * C
    image = (part // parts) * H * line
    first = part % parts * rows
    total = tl.zeros([KERNEL_COLS, COLS, CHANNELS], dtype=tl.float32)
    for y in range(tl.maximum(first, K // 2 - dy), tl.minimum(tl.minimum(first + rows, H), H + K // 2 - dy)):
        from_row = gradient + image + y * line
        to_row = u + image + (y + dy - K // 2) * line
        for start in range(0, W, COLS):
            col = start + lane
            x = col + dx - K // 2
            g = tl.load(from_row + col * C + channel, mask=(col < W) & (channel < C), other=0.0).to(
                tl.float32
            )
            seen = (x >= 0) & (x < W) & (dx < K) & (channel < C)
            total += g * tl.load(to_row + x * C + channel, mask=seen, other=0.0).to(tl.float32)
    taps = tl.arange(0, KERNEL_COLS)[:, None]
    channels = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    place = ((part.to(tl.int64) * K + dy) * K + taps) * C + channels
    tl.store(out + place, tl.sum(total, axis=1), mask=(taps < K) & (channels < C))


@tuned(RESAMPLE, {"COLS": 16, "CHANNELS": 128}, key=["C"])
@triton.jit(do_not_specialize=["TAPS"])
def _transpose(first, second, out, C, TAPS, COLS: tl.constexpr, CHANNELS: tl.constexpr):
    """out (2, TAPS, C) from first and second (C, TAPS); (1, TAPS, C) where the grid ends there."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    tap = tl.program_id(1) * COLS + tl.arange(0, COLS)[:, None]
    inside = (channel < C) & (tap < TAPS)
    place = channel * TAPS + tap
    if tl.program_id(2) == 0:
        tl.store(out + tap * C + channel, tl.load(first + place, mask=inside), mask=inside)
    else:
        tl.store(out + (TAPS + tap) * C + channel, tl.load(second + place, mask=inside), mask=inside)


def transposed(weights: Sequence[Tensor]) -> list[Tensor]:
    """Depth-wise weights (c, 1, K, K) as the kernel reads them, (K, K, c): channels in neighboring places.

    All of the same shape. One launch does two of them. A copy that is kept for the next call would go wrong:
    whatever changes weights by way of `.data`, as ComfyUI and PEFT do, leaves no trace.
    """
    C, _, K, _ = weights[0].shape
    out: list[Tensor] = []

    def call() -> LaunchArguments:
        def grid(tile: dict[str, int]) -> tuple[int, ...]:
            return triton.cdiv(C, tile["CHANNELS"]), triton.cdiv(K * K, tile["COLS"]), len(pair)

        return LaunchArguments(grid, (C, K * K), {})

    for i in range(0, len(weights), 2):
        pair = [weight.contiguous() for weight in weights[i : i + 2]]
        taps = pair[0].new_empty(len(pair), K, K, C)
        _transpose.launch((len(pair), C, K, taps.dtype, taps.device), (pair[0], pair[-1], taps), call)
        out += taps.unbind()
    return out


def _sums(
    step: int, u: Tensor, taps: Tensor, bias: Tensor | None, upstream: Tensor | None, out: Tensor, kind: str
) -> Tensor:
    """Launches `_depthwise`; taps (K, K, c)."""
    if too_many(u):
        for some, some_upstream, some_out in turns(u, upstream, out):
            _sums(step, some, taps, bias, some_upstream, some_out, kind)
        return out
    batch, H, W, C = u.shape
    half, K = C // 2, len(taps)

    def call() -> LaunchArguments:
        def grid(tile: dict[str, int]) -> tuple[int, ...]:
            tiles = triton.cdiv(H, tile["ROWS"]) * triton.cdiv(W, tile["COLS"])
            return tiles, triton.cdiv(half, tile["CHANNELS"]), batch

        factor = math.sqrt(half) if kind == "simple" else 1 / math.sqrt(C)
        options = {"HALF": half, "K": K, "STEP": step, "SIGMOID": kind == "sigmoid"}
        return LaunchArguments(
            grid, (H, W, factor, bucket(batch * H * W)), options | {"HAS_BIAS": bias is not None}
        )

    tensors = (
        u,
        taps,
        taps if bias is None else bias.contiguous(),
        u if upstream is None else upstream,
        out,
    )
    _depthwise.launch((step, u.shape, K, kind, *dtypes(tensors), bias is None, u.device), tensors, call)
    return out


def _sum_weight_gradient(u: Tensor, gradient: Tensor, weight: Tensor) -> Tensor:
    batch, H, W, C = u.shape
    K = weight.shape[-1]
    parts = min(H, max(1, PROGRAMS // (batch * K * triton.cdiv(C, 32))))
    rows = triton.cdiv(H, parts)
    parts = batch * triton.cdiv(H, rows)
    out = u.new_empty(parts, K, K, C, dtype=torch.float32)

    def call() -> LaunchArguments:
        def grid(tile: dict[str, int]) -> tuple[int, ...]:
            return parts, K, triton.cdiv(C, tile["CHANNELS"])

        numbers = H, W, rows, C, bucket(batch * H * W), number_of_gpu(u.device)
        return LaunchArguments(grid, numbers, {"K": K, "KERNEL_COLS": triton.next_power_of_2(K)})

    tensors = u, gradient, out
    _weight_gradient.launch((u.shape, K, *dtypes(tensors), u.device), tensors, call)
    return out.sum(0).permute(2, 0, 1).unsqueeze(1).to(weight.dtype).contiguous()


def _empty(u: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """float32 for float16, whose range the product leaves."""
    dtype = torch.float32 if u.dtype == torch.float16 else u.dtype
    return u.new_empty(*u.shape[:3], u.shape[3] // 2, dtype=dtype)


def _empty_gradients(
    upstream: Tensor, u: Tensor, weight: Tensor, bias: Tensor | None, kind: str, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of u, weight and bias; without entries where not wanted."""
    of_u, of_weight, of_bias = wanted
    return (
        torch.empty_like(u) if of_u else u.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format) if of_weight else weight.new_empty(0),
        weight.new_empty(u.shape[3] if of_bias else 0),
    )


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    u, weight, bias, ctx.kind = inputs
    ctx.save_for_backward(u, weight, bias)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    u, weight, bias = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    gradients = _gradients(upstream, u, weight, bias, ctx.kind, wanted)
    return (*(g if asked else None for g, asked in zip(gradients, wanted, strict=True)), None)


def _flops(u: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(u) * weight[-1] ** 2


def _gradient_flops(
    upstream: Sequence[int],
    u: Sequence[int],
    weight: Sequence[int],
    bias: Any,
    kind: str,
    wanted: list[bool],
    **_: Any,
) -> int:
    return (1 + wanted[0] + wanted[1]) * _flops(u, weight)


@operator(
    "depthwise_gate_gradients",
    "(Tensor upstream, Tensor u, Tensor weight, Tensor? bias, str kind, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor)",
    _empty_gradients,
    flops=_gradient_flops,
)
def _gradients(
    upstream: Tensor, u: Tensor, weight: Tensor, bias: Tensor | None, kind: str, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    of_u, of_weight, of_bias = wanted
    u = u.contiguous()
    (taps,) = transposed([weight])
    sums = _sums(GRADIENT, u, taps, bias, upstream.contiguous(), torch.empty_like(u), kind)
    return (
        _sums(PLAIN, sums, taps.flip(0, 1), None, None, torch.empty_like(u), kind)
        if of_u
        else u.new_empty(0),
        _sum_weight_gradient(u, sums, weight) if of_weight else u.new_empty(0),
        sums.sum((0, 1, 2), dtype=torch.float32).to(weight.dtype) if of_bias else u.new_empty(0),
    )


@operator(
    "depthwise_gate",
    "(Tensor u, Tensor weight, Tensor? bias, str kind) -> Tensor",
    _empty,
    _backward,
    _remember,
    _flops,
)
def _gate(u: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    (taps,) = transposed([weight])
    return gate_of_taps(u.contiguous(), taps, bias, kind)


def gate_of_taps(u: Tensor, taps: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """`depthwise_gate` without autograd, of taps (K, K, c); u contiguous."""
    return _sums(FORWARD, u, taps, bias, None, _empty(u, taps, bias, kind), kind)


def depthwise_gate(u: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """See `ops.backends.Backend`. Dtypes of u, weight and bias alike; float32 results for float16."""
    result: Tensor = _gate(u, weight, bias, kind)
    return result


def _like(u: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(u, memory_format=torch.contiguous_format)


@operator("depthwise", "(Tensor u, Tensor weight) -> Tensor", _like, flops=_flops)
def _convolution(u: Tensor, weight: Tensor) -> Tensor:
    (taps,) = transposed([weight])
    return _sums(PLAIN, u.contiguous(), taps, None, None, _like(u, weight), "simple")


def without_gate(u: Tensor, weight: Tensor) -> Tensor:
    """See `ops.backends.Backend`. Without gradients; c even, dtypes of u and weight alike."""
    result: Tensor = _convolution(u, weight)
    return result
