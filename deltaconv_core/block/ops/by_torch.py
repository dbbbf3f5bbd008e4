"""The backend of plain PyTorch, for every device: equal formulations of each step, of which the fastest runs.

Convolution: PyTorch's depth-wise kernels differ by factors of ten between memory layouts, kernel sizes and
dtypes, and which is fast where differs between versions and devices. Projection: interpolation and conv_out
act on different axes, so conv_out(concat(g1, enlarged(g2))) = W1 g1 + enlarged(W2 g2): a smaller stage may
be projected before it is enlarged, which costs a quarter at half scale. Its bias can be added there too,
because bilinear weights sum to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from . import fastest
from .backend import Size
from .float16 import half_product

Convolution = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Projection = Callable[[Sequence[Tensor], Tensor, Tensor, Size, str], Tensor]

CUDNN_ENTRIES = 2**31 - 1  # of one convolution: for more, PyTorch leaves cuDNN, for a slower way
WIDE = 15  # columns of the zero-bordered kernel; oneDNN has a fast path from there on


# ---- a stage's steps, on (B, channels, H, W) in any memory layout ----


def stage_size(grid: Size, scale: float) -> Size:
    """Rows and columns of a stage: int(side * scale), at least 1."""
    return max(1, int(grid[0] * scale)), max(1, int(grid[1] * scale))


def shrink(x: Tensor, scale: float, pooling: str) -> Tensor:
    """(B, c, H, W) -> (B, c, *stage_size), by adaptive average pooling or bilinear interpolation.

    Bilinear samples at (i + 1/2) / scale - 1/2, as the authors' earlier block does: on odd sizes the step is
    1 / scale and not the ratio of the sizes.
    """
    height, width = x.shape[2:]
    size = stage_size((height, width), scale)
    if pooling == "average" and (height, width) == (2 * size[0], 2 * size[1]):
        return F.avg_pool2d(x, 2)  # the same windows, without working them out
    if pooling == "average" and x.device.type == "mps" and (height % size[0] or width % size[1]):
        return shrink_by_products(x, size)
    if pooling == "average":
        return F.adaptive_avg_pool2d(x, size)
    # F.interpolate computes the size from the scale itself and refuses 0; the operator below takes both.
    smaller: Tensor = torch.ops.aten.upsample_bilinear2d(x, size, False, scale, scale)
    return smaller


def shrink_by_products(x: Tensor, size: Size) -> Tensor:
    """Adaptive average pooling (B, c, H, W) -> (B, c, *size) as products of matrices: on Apple's GPUs most
    versions of PyTorch refuse sizes that do not divide."""
    down, across = (_windows(*sides).to(x.device) for sides in zip(x.shape[2:], size, strict=True))
    return (down @ x.float() @ across.T).to(x.dtype)


def _windows(whole: int, parts: int) -> Tensor:
    """(parts, whole) shares of what is averaged; windows overlap where the sizes do not divide."""
    part, at = torch.arange(parts)[:, None], torch.arange(whole)
    inside = (at >= part * whole // parts) & (at < -(-(part + 1) * whole // parts))
    return inside / inside.sum(dim=1, keepdim=True)


def enlarge(x: Tensor, grid: Size) -> Tensor:
    """(B, c, h, w) -> (B, c, H, W), bilinear, corners not aligned."""
    return F.interpolate(x, size=grid, mode="bilinear", align_corners=False)


def gate(x: Tensor, kind: str) -> Tensor:
    """(B, c, h, w) -> (B, c / 2, h, w): the first half of the channels times a function of the second.

    Products of two float16 halves leave float16's range, so they are formed and returned in float32.
    """
    x = x.float() if x.dtype == torch.float16 else x
    if kind == "sigmoid":
        return F.glu(x, dim=1)
    a, b = x.chunk(2, dim=1)
    return _gated(a, b, kind)


def context(x: Tensor, kind: str) -> Tensor:
    """(B, c, H, W) -> (B, c / 2, H, W): the gate, with its own mean over the image as the first half.

    Linear attention with one number per channel for its state: what the first half holds where the second
    lets it pass is averaged, and handed to each token as far as its own second half lets it pass. float32
    for float16, as `gate`.
    """
    x = x.float() if x.dtype == torch.float16 else x
    mean, b = gate(x, kind).mean(dim=(2, 3), keepdim=True), x.chunk(2, dim=1)[1]
    return mean * torch.sigmoid(b) if kind == "sigmoid" else _gated(mean, b, kind)


def _gated(a: Tensor, b: Tensor, kind: str) -> Tensor:
    channels = 2 * b.shape[1]
    factor = math.sqrt(channels / 2) if kind == "simple" else 1 / math.sqrt(channels)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return a * (b * factor)
    return torch.addcmul(b.new_zeros(()), a, b, value=factor)  # in one pass


def merge(stages: Sequence[Tensor], kind: str) -> Tensor:
    """Joins the stages' (B, c, H, W): on channels ("concat") or by addition ("sum", formula 3)."""
    if len(stages) == 1:
        return stages[0]
    return torch.cat(tuple(stages), dim=1) if kind == "concat" else sum(stages[1:], start=stages[0])


def joined(stages: Sequence[Tensor], grid: Size, kind: str) -> Tensor:
    """Stages (B, h, w, c), each enlarged to the grid, as tokens (B, H * W, merged)."""
    full = [_first(g) if _size(g) == grid else enlarge(_first(g), grid) for g in stages]
    return _last(merge(full, kind)).flatten(1, 2)


# ---- equal formulations of a convolution, and of a projection ----


def channels_last(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depth-wise convolution of (B, c, H, W) over channels-last memory, in that layout."""
    if u.numel() > CUDNN_ENTRIES and len(u) > 1:
        return torch.cat([channels_last(image, weight, bias) for image in torch.split(u, 1)])
    padding = weight.shape[2] // 2, weight.shape[3] // 2
    return F.conv2d(u, weight, bias, padding=padding, groups=len(weight))


def channels_first(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same by way of a copy in the other layout."""
    return channels_last(u.contiguous(), weight, bias)


def wide_kernel(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same with columns of zeros beside the kernel, which PyTorch may have a faster way for."""
    border = (WIDE - weight.shape[3]) // 2
    return channels_last(u, F.pad(weight, (border, border)), bias)


def in_float32(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same in float32, for dtypes that the device is slow in."""
    return channels_last(u.float(), weight.float(), None if bias is None else bias.float())


def literal(stages: Sequence[Tensor], weight: Tensor, bias: Tensor, grid: Size, merge_kind: str) -> Tensor:
    """Enlarges, joins, projects: what the block's description says."""
    f = joined(stages, grid, merge_kind)
    return _add_product(_everywhere(bias, f), f, weight)


def early(stages: Sequence[Tensor], weight: Tensor, bias: Tensor, grid: Size, merge_kind: str) -> Tensor:
    """Projects smaller stages before enlarging them: for stages joined on channels, one of them smaller."""
    parts = list(zip(stages, torch.split(weight, stages[0].shape[3], dim=1), strict=True))
    y: Tensor | None = None
    for g, part in parts:
        if _size(g) == grid:
            continue
        f = g.flatten(1, 2)
        small = _add_product(_everywhere(bias, f), f, part) if y is None else _product(f, part)
        up = _last(enlarge(_first(small.view(*g.shape[:3], -1)), grid)).flatten(1, 2)
        y = up if y is None else y + up
    assert y is not None
    for g, part in parts:
        if _size(g) == grid:
            y = _add_product(y, g.flatten(1, 2), part)
    return y


PROJECTIONS: dict[str, Projection] = {"literal": literal, "early": early}
CONVOLUTIONS: dict[str, Convolution] = {"channels_last": channels_last, "channels_first": channels_first}
ALSO_WIDE = {**CONVOLUTIONS, "wide_kernel": wide_kernel}


def offered(dtype: torch.dtype, kernel_size: int) -> dict[str, Convolution]:
    """The convolutions that may be the fastest for a dtype and a kernel size."""
    some = ALSO_WIDE if WIDE - 4 <= kernel_size < WIDE else CONVOLUTIONS
    return {**some, "in_float32": in_float32} if dtype in (torch.float16, torch.bfloat16) else some


# ---- the backend ----


class TorchBackend:
    """See `backend.Backend`."""

    name = "torch"

    def why_not(self, x: Tensor) -> str | None:
        return None

    def shrink(self, u: Tensor, scale: float, pooling: str) -> Tensor:
        return _last(shrink(_first(u), scale, pooling)).contiguous()

    def depthwise_gate(self, u: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
        kernel_size = weight.shape[3]

        def trial(convolve: Convolution) -> None:
            part = u[:1, : fastest.trial_rows(u.device, _size(u))]
            _convolve_and_gate(convolve, part, weight, bias, kind)

        convolve = fastest.fastest(
            "convolution",
            offered(u.dtype, kernel_size),
            default="channels_last",
            like=u,
            details=("K", kernel_size, "channels", u.shape[3]),
            tokens=u.shape[0] * u.shape[1] * u.shape[2],
            trial=trial,
        )
        return _convolve_and_gate(convolve, u, weight, bias, kind)

    def depthwise(self, u: Tensor, weight: Tensor) -> Tensor:
        return _last(channels_last(_first(u), weight, None))

    def project(
        self, stages: Sequence[Tensor], weight: Tensor, bias: Tensor, grid: Size, merge: str
    ) -> Tensor:
        if merge == "sum" or all(_size(g) == grid for g in stages):
            return literal(stages, weight, bias, grid, merge)

        def trial(form: Projection) -> None:
            rows = fastest.trial_rows(weight.device, grid)
            parts = [g[:1, : max(1, g.shape[1] * rows // grid[0])] for g in stages]
            form(parts, weight, bias[:1], (rows, grid[1]), merge)

        form = fastest.fastest(
            "projection",
            PROJECTIONS,
            default="literal" if torch.is_grad_enabled() else "early",  # its gradients are rounded once more
            like=weight,
            details=("stages", len(stages), "channels", weight.shape[1], weight.shape[0]),
            tokens=len(stages[0]) * grid[0] * grid[1],
            trial=trial,
        )
        return form(stages, weight, bias, grid, merge)


def _convolve_and_gate(
    convolve: Convolution, u: Tensor, weight: Tensor, bias: Tensor | None, kind: str
) -> Tensor:
    g = _last(gate(convolve(_first(u), weight, bias), kind))
    g = g if u.dtype == torch.float16 else g.to(u.dtype)
    return g if g.stride(3) == 1 else g.contiguous()


def _everywhere(bias: Tensor, f: Tensor) -> Tensor:
    """(B, 1, C) -> (B, N, C) in memory of its own, for the tokens f (B, N, c)."""
    return bias.expand(-1, f.shape[1], -1).clone(memory_format=torch.contiguous_format)


def _add_product(start: Tensor, f: Tensor, weight: Tensor) -> Tensor:
    """start + f @ weight.T: (B, N, C) + (B, N, c) @ (c, C). Uses start's memory where autograd is off."""
    if f.dtype != weight.dtype:
        return start.float() + half_product(f, weight)
    flat = start.flatten(0, 1)
    out = None if torch.is_grad_enabled() or torch.compiler.is_compiling() else flat
    return torch.addmm(flat, f.flatten(0, 1), weight.T, out=out).view(start.shape)


def _product(f: Tensor, weight: Tensor) -> Tensor:
    return half_product(f, weight) if f.dtype != weight.dtype else F.linear(f, weight)


def _size(u: Tensor) -> Size:
    return u.shape[1], u.shape[2]


def _first(u: Tensor) -> Tensor:
    """(B, H, W, c) -> (B, c, H, W), a view."""
    return u.permute(0, 3, 1, 2)


def _last(u: Tensor) -> Tensor:
    """(B, c, H, W) -> (B, H, W, c), a view."""
    return u.permute(0, 2, 3, 1)
