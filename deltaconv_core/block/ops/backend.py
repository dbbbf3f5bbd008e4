"""What the block asks of whoever computes it, and who does: plain PyTorch, Triton, or the slow reference.

All tensors are channels-last, (B, H, W, c) with contiguous memory, so that tokens (B, H * W, c) and pictures
are views of one another. All functions are differentiable in every tensor argument, sums are float32
(float64 for float64), and any height and width of at least 1 is allowed.

float16: the product of the gate leaves float16's range, so `depthwise_gate` forms it in float32. What it
returns there is float32, or anything else that represents the product without overflow and without rounding
it more coarsely than float16 does: only the `project` of the same backend ever reads it, and `project` owes
the same freedom from overflow. `float16.py` says how the PyTorch backend does it. On a CPU the block
calls with float16 under autocast only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

Size = tuple[int, int]
LayerWeights = tuple[Tensor, Tensor | None]
"""A layer's weight and bias."""


class SpecLike(Protocol):
    """What a block is made of, as far as it is mixed at once: the names of its `BlockSpec`."""

    @property
    def scales(self) -> tuple[float, ...]: ...

    @property
    def gate(self) -> str: ...

    @property
    def merge(self) -> str: ...


class Backend(Protocol):
    """The steps of a ΔConvBlock between its two projections, and the second of them."""

    name: str

    def why_not(self, x: Tensor) -> str | None:
        """None if this backend can work on tensors like x (device, dtype, whether autograd is on); otherwise
        the reason, as a clause: "x is on a CPU and Triton needs a GPU"."""

    def shrink(self, u: Tensor, scale: float, pooling: str) -> Tensor:
        """(B, H, W, c) -> (B, *stage_size((H, W), scale), c), contiguous.

        Args:
            pooling: "average" (adaptive windows) or "bilinear" (samples at (i + 1/2) / scale - 1/2).
        """

    def depthwise_gate(self, u: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
        """K x K depth-wise convolution with zeros around, then the gate: (B, H, W, c) -> (B, H, W, c / 2).

        Args:
            u: (B, H, W, c), contiguous.
            weight: (c, 1, K, K), u's dtype, any strides.
            bias: (c), u's dtype, or None.
            kind: with halves a, b of the channels, "simple" a * b * sqrt(c / 2), "sigmoid" a * sigmoid(b),
                "scaled" a * b / sqrt(c).

        Returns:
            In u's dtype; float16: see above. The last dimension has stride 1; the others are free.
        """

    def depthwise(self, u: Tensor, weight: Tensor) -> Tensor:
        """K x K depth-wise convolution with zeros around, and no gate; for mixers, not for blocks.

        Args:
            u: (B, H, W, c), contiguous.
            weight: (c, 1, K, K), u's dtype, any strides.

        Returns:
            (B, H, W, c) in u's dtype; any strides.
        """

    def project(
        self, stages: Sequence[Tensor], weight: Tensor, bias: Tensor, grid: Size, merge: str
    ) -> Tensor:
        """Enlarges each stage to the grid (bilinear, corners not aligned), joins them, and projects.

        Args:
            stages: (B, h_i, w_i, c / 2) each, as `depthwise_gate` returned them.
            weight: (C, merged) in the dtype that the block computes in; any strides.
            bias: (B, 1, C): what is added at every position of an image.
            grid: (H, W).
            merge: "concat" (on channels: merged = c / 2 * number of stages) or "sum" (merged = c / 2).

        Returns:
            (B, H * W, C), contiguous, in weight's dtype, or float32 for float16.
        """
