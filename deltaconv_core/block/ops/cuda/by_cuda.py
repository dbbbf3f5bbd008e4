"""The block with depth-wise convolutions on tensor cores. Its tensors are views of planes (B, c, H, W)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backend import Backend, Size
from ..by_torch import TorchBackend, shrink
from ..triton import BACKEND as TRITON
from .launcher import depthwise_gate, unsuited


class CudaBackend:
    """See `ops.backend.Backend`; u comes from `expand`. Without gradients."""

    name = "cuda"

    def why_not(self, x: Tensor, grid: Size = (2, 2), kernel_size: int = 3) -> str | None:
        """None if it can mix tokens like x on a grid (H, W); otherwise the reason, as a clause."""
        if torch.is_grad_enabled():
            return "autograd is on and the kernel for tensor cores has no gradients"
        return unsuited(x.device, x.dtype, grid[1], kernel_size) or None

    def what_runs(self, x: Tensor) -> str:
        """Which kernels mix tokens like x, as a clause."""
        reason = TRITON.why_not(x)
        rest = "Triton" if reason is None else f"PyTorch, because {reason}"
        return f"depth-wise convolutions on tensor cores, the last projection by {rest}"

    def expand(self, x: Tensor, weight: Tensor, bias: Tensor | None, grid: Size) -> Tensor:
        """The first projection: x (B, H * W, C), weight (c, C), bias (c) -> (B, H, W, c), of planes."""
        matrix, columns = weight.expand(len(x), -1, -1), x.transpose(1, 2)
        if bias is None:
            u = torch.bmm(matrix, columns)
        else:
            u = torch.baddbmm(bias[:, None], matrix, columns)
        return _last(u.view(*u.shape[:2], *grid))

    def shrink(self, u: Tensor, scale: float, pooling: str) -> Tensor:
        return _last(shrink(_first(u), scale, pooling).contiguous())

    def depthwise_gate(self, u: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
        planes = _first(u)
        width, channels = planes.shape[3], planes.shape[1]
        # The kernel reads pairs of columns. A column of zeros more changes nothing: zeros are around anyway.
        planes = F.pad(planes, (0, 1)) if width % 2 else planes
        factor = math.sqrt(channels / 2) if kind == "simple" else 1 / math.sqrt(channels)
        dtype = torch.float32 if u.dtype == torch.float16 else u.dtype
        g = depthwise_gate(planes, weight, bias, kind == "sigmoid", factor, dtype)
        return _last(g[..., :width].contiguous())

    def depthwise(self, u: Tensor, weight: Tensor) -> Tensor:
        return _rest(u).depthwise(u, weight)

    def project(
        self, stages: Sequence[Tensor], weight: Tensor, bias: Tensor, grid: Size, merge: str
    ) -> Tensor:
        return _rest(stages[0]).project(stages, weight, bias, grid, merge)


def _rest(x: Tensor) -> Backend:
    """Who computes what no kernel for tensor cores does."""
    return TorchBackend() if TRITON.why_not(x) else TRITON


def _first(u: Tensor) -> Tensor:
    """(B, H, W, c) -> (B, c, H, W), a view."""
    return u.permute(0, 3, 1, 2)


def _last(u: Tensor) -> Tensor:
    """(B, c, H, W) -> (B, H, W, c), a view."""
    return u.permute(0, 2, 3, 1)
