"""The mean token, projected: what a block adds at every position of an image."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LaunchArguments
from .tuning import MEAN, PRODUCT, bucket, tuned

SUMS = 32  # in which the tokens of an image are summed; the kernel of the product sums those


@tuned(MEAN, {"ROWS": 16, "CHANNELS": 128}, key=["C", "SIZE"])
@triton.jit(do_not_specialize=["N", "rows", "SIZE"])
def _sum_tokens(x, out, N, rows, C, SIZE, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """out (B, parts, C): each the sum of `rows` tokens of x (B, N, C)."""
    part = tl.program_id(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    image = tl.program_id(2).to(tl.int64)
    end = tl.minimum((part + 1) * rows, N)
    total = tl.zeros([ROWS, CHANNELS], dtype=tl.float32)
    for start in range(part * rows, end, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & (channel < C)[None, :]
        line = x + (image * N + row)[:, None] * C
        total += tl.load(line + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    place = (image * tl.num_programs(0) + part) * C + channel
    tl.store(out + place, tl.sum(total, axis=0), mask=channel < C)


@tuned(PRODUCT, {"COLUMNS": 64, "DEPTH": 64}, key=["C"])
@triton.jit(do_not_specialize=["N"])
def _project_mean(
    sums, weight, bias, more, out, N, C, weight_stride,
    HAS_BIAS: tl.constexpr, HAS_MORE: tl.constexpr, SUMS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out (B, C) = the sum of sums (B, SUMS, C) / N @ weight (C, C).T + bias (C) + more (C)."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    image = tl.program_id(1).to(tl.int64)
    part = tl.arange(0, SUMS)
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for start in range(0, C, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        lines = sums + (image * SUMS + part)[:, None] * C
        mean = tl.sum(tl.load(lines + depth[None, :], mask=(depth < C)[None, :], other=0.0), axis=0) / N
        inside = (column < C)[:, None] & (depth < C)[None, :]
        entries = tl.load(weight + column[:, None] * weight_stride + depth[None, :], mask=inside, other=0.0)
        total += tl.sum(entries.to(tl.float32) * mean[None, :], axis=1)
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column < C, other=0.0).to(tl.float32)
    if HAS_MORE:
        total += tl.load(more + column, mask=column < C, other=0.0).to(tl.float32)
    tl.store(out + image * C + column, total.to(out.dtype.element_ty), mask=column < C)


def mean_product(x: Tensor, weight: Tensor, bias: Tensor | None, more: Tensor | None) -> Tensor:
    """The mean of the tokens x (B, N, C) @ weight (C, C).T + bias (C) + more (C) -> (B, 1, C), in x's dtype.

    Without autograd. Sums are float32, and rounded once. x contiguous; weight, bias, more in x's dtype.
    """
    batch, N, C = x.shape
    sums = x.new_empty(batch, SUMS, C, dtype=torch.float32)
    out = x.new_empty(batch, 1, C)

    def call_sum() -> LaunchArguments:
        numbers = N, triton.cdiv(N, SUMS), C, bucket(batch * N)
        return LaunchArguments(lambda tile: (SUMS, triton.cdiv(C, tile["CHANNELS"]), batch), numbers, {})

    def call_product() -> LaunchArguments:
        options = {"HAS_BIAS": bias is not None, "HAS_MORE": more is not None, "SUMS": SUMS}
        numbers = N, C, weight.stride(0)
        return LaunchArguments(lambda tile: (triton.cdiv(C, tile["COLUMNS"]), batch), numbers, options)

    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    where = x.shape, x.dtype, x.device
    _sum_tokens.launch(where, (x, sums), call_sum)
    tensors = (
        sums,
        weight,
        weight if bias is None else bias.contiguous(),
        weight if more is None else more.contiguous(),
        out,
    )
    _project_mean.launch((*where, weight.stride(0), bias is None, more is None), tensors, call_product)
    return out
