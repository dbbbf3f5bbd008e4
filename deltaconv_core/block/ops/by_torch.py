"""The backend of plain PyTorch, for every device: equal formulations of each step, of which the fastest runs.

Convolution: PyTorch's depth-wise kernels differ by factors of ten between memory layouts, kernel sizes and
dtypes, and which is fast where differs between versions and devices. Projection: interpolation and conv_out
act on different axes, so conv_out(concat(g1, enlarged(g2))) = W1 g1 + enlarged(W2 g2): a smaller stage may
be projected before it is enlarged, which costs a quarter at half scale. Its bias can be added there too,
because bilinear weights sum to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from . import fastest
from .backend import Size
from .float16 import half_product
from .pyramid import enlarge, gate, merge, shrink

Convolution = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Projection = Callable[[Sequence[Tensor], Tensor, Tensor, Size, str], Tensor]

WIDE = 15  # columns of the zero-bordered kernel; oneDNN has a fast path from there on


def channels_last(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depth-wise convolution of (B, c, H, W) over channels-last memory, in that layout."""
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
    full = [_first(g) if _size(g) == grid else enlarge(_first(g), grid) for g in stages]
    f = _last(merge(full, merge_kind)).flatten(1, 2)
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


class PlainBackend:
    """See `backends.Backend`."""

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
