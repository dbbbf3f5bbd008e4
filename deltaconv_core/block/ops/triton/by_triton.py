"""Triton as a backend of the block; says why it cannot be used, instead of failing when it is imported."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ....util.compiling import constant_result
from ..backend import LayerWeights, Size, SpecLike
from ..by_torch import TorchBackend, shrink, stage_size
from ..operators import operators_wanted

TAKEN_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OLDEST_TRITON = 3
OLDEST_GPU = (8, 0)  # compute capability; triton supports no older one
LARGEST_KERNEL = 31  # all taps of a row are unrolled


class TritonBackend:
    """See `ops.backend.Backend`. float32 inside, forward and backward, on any size."""

    name = "triton"

    def why_not(self, x: Tensor) -> str | None:
        """None if the kernels run on tensors like x; otherwise the reason, as a clause."""
        if x.dtype not in TAKEN_DTYPES:
            return f"x is {_name(x.dtype)} and the kernels take float16, bfloat16 and float32"
        reason: str | None = _why_not_on(x.device.type, x.device.index)
        return reason

    def mixed_at_once(
        self, x: Tensor, grid: Size, spec: SpecLike, up: LayerWeights, pool: LayerWeights, *rest: LayerWeights
    ) -> Tensor | None:
        """A whole block, see `inference.mixed_at_once`; None where it cannot be used."""
        if rest[0][0].shape[3] > LARGEST_KERNEL or operators_wanted((x, up, pool, *rest)):
            return None
        from . import inference, launch

        if launch.too_many(x):
            return None
        return inference.mixed_at_once(x, grid, spec, up, pool, rest[:-1], rest[-1])

    def shrink(self, u: Tensor, scale: float, pooling: str) -> Tensor:
        """(B, H, W, c) -> (B, *stage_size, c); bilinear interpolation is PyTorch's."""
        if pooling == "average":
            from .pool import average

            return average(u, stage_size((u.shape[1], u.shape[2]), scale))
        return shrink(u.permute(0, 3, 1, 2), scale, pooling).permute(0, 2, 3, 1).contiguous()

    def depthwise_gate(self, u: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
        """(B, H, W, c) -> (B, H, W, c / 2); float32 for float16. Kernels above 31 x 31 are PyTorch's."""
        if weight.shape[3] > LARGEST_KERNEL:
            return TorchBackend().depthwise_gate(u, weight, bias, kind)
        from . import depthwise_gate as kernels

        return kernels.depthwise_gate(u, weight, bias, kind)

    def depthwise(self, u: Tensor, weight: Tensor) -> Tensor:
        """(B, H, W, c) -> (B, H, W, c); with gradients, above 31 x 31 and with odd c PyTorch's."""
        wanted = torch.is_grad_enabled() and (u.requires_grad or weight.requires_grad)
        if wanted or weight.shape[3] > LARGEST_KERNEL or u.shape[3] % 2:
            return TorchBackend().depthwise(u, weight)
        from . import depthwise_gate as kernels

        return kernels.without_gate(u, weight)

    def project(
        self, stages: Sequence[Tensor], weight: Tensor, bias: Tensor, grid: Size, merge: str
    ) -> Tensor:
        """Stages (B, h, w, c / 2) -> (B, H * W, C) in weight's dtype."""
        from . import project as kernels

        return kernels.project(stages, weight, bias, grid, merge)


@constant_result
def _why_not_on(kind: str, index: int | None) -> str | None:
    if kind != "cuda" and not os.environ.get("TRITON_INTERPRET"):
        return f"x is on a {kind.upper()} and triton needs a CUDA or ROCm GPU"
    return _tried(kind, index)


def try_triton(kind: str, index: int | None) -> str | None:
    """Imports the kernels and launches one that does nothing: half an installation shows only then."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        import triton

        if int(triton.__version__.partition(".")[0]) < OLDEST_TRITON:
            return f"triton is {triton.__version__} and the kernels need {OLDEST_TRITON}.0"
        from . import depthwise_gate, pool, project  # noqa: F401
        from .tuning import INTERPRETED, nothing

        if INTERPRETED:
            return None
        if kind != "cuda":
            return f"x is on a {kind.upper()}, and TRITON_INTERPRET was set after triton had been imported"
        capability = torch.cuda.get_device_capability(index)
        if torch.version.hip is None and capability < OLDEST_GPU:
            return "the GPU's compute capability is {}.{} and triton needs 8.0".format(*capability)
        with torch.cuda.device(index):
            nothing[(1,)]()
    except Exception as error:  # a broken installation raises anything
        return f"triton does not work here ({type(error).__name__}: {_first_line(error)})"
    return None


_tried = functools.cache(try_triton)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
