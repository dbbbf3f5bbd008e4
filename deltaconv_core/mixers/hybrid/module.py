"""HybridMixer: what stands between an attention's own projections in place of the attention.

A fixed number of landmarks carries what depends on content, static kernels on the values what is near, so
that the cost is linear in the number of tokens. Nothing in it is from the ΔConv paper but the idea of two
parts; its parameters are fitted by `distill.hybrid`, without a gradient step, or left as they start.
`reference.py` has the formulas and is the specification of this fast path.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...block import ops
from ...errors import DeltaConvError
from ..local import local_part
from .cells import Cells, Grid, key_weights
from .landmarks import global_part, own_share
from .spec import HybridSpec


class HybridMixer(nn.Module):
    """Mixes queries, keys and values as attention does, at a cost that grows with the tokens alone.

    A fresh one is its global part alone, with gains of 1; kernels and the gain on the mean are zero.

    Args:
        spec: what the mixer is made of.
        device, dtype: of the parameters, which are few; they are moved and cast to what each call needs.

    Example:
        >>> mixer = HybridMixer(HybridSpec(dim=64, heads=2, head_dim=32))
        >>> q, k, v = torch.randn(3, 1, 2, 15 * 20, 32)
        >>> mixer(q, k, v, grid=(15, 20)).shape
        torch.Size([1, 2, 300, 32])
    """

    kind = "hybrid"

    def __init__(
        self,
        spec: HybridSpec,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.spec = spec
        if spec.landmarks:
            self.gain = nn.Parameter(torch.ones(spec.shared, **factory))
        if spec.kernel_size:
            shape = (spec.shared, 1, spec.kernel_size, spec.kernel_size)
            self.kernels = nn.ParameterList(torch.zeros(shape, **factory) for _ in spec.scales)
        if spec.mean:
            self.mean = nn.Parameter(torch.zeros(spec.shared, **factory))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, mask: Tensor | None = None) -> Tensor:
        """What attention would answer, about.

        Args:
            q, k, v: (B, heads, H * W, d) floating point, row by row; any strides.
            grid: (H, W), both at least 1.
            mask: (B, H * W) of the keys, or (B or 1, 1, 1, H * W) as PyTorch's attention takes it: bool, True
                where a key counts; or floating point, added to the scores.

        Returns:
            (B, heads, H * W, d) in q's dtype. The landmarks, and all that is computed of them alone, are
            float32 at least; the rest runs in q's dtype, except for what `ops.compute_dtype` says of a CPU.

        Raises:
            DeltaConvError: tokens that do not fit the grid or the mixer.
        """
        if mask is not None and mask.ndim == 4 and mask.shape[1:3] == (1, 1):
            mask = mask[:, 0, 0].expand(len(q), -1)
        self._check(q, k, v, grid, mask)
        if not len(q):
            return q.clone()
        dtype = q.dtype
        computed = ops.compute_dtype(q[:, 0])
        q, k, v = q.to(computed), k.to(computed), v.to(computed)
        weights = key_weights(mask, q)
        return self._mix(q, k, v, (int(grid[0]), int(grid[1])), weights).to(dtype)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, weights: Tensor | None) -> Tensor:
        spec = self.spec
        mean = self._mean(v, weights) if spec.mean else None
        if not spec.landmarks:
            y = None if mean is None else mean.to(v.dtype).expand(v.shape)
            near = self._near(v, grid, weights) if spec.kernel_size else None
            return y if near is None else near if y is None else near + y  # type: ignore[return-value]
        cells = Cells.of(grid, spec.landmarks, weights, q)
        y = self._far(q, k, v, cells, mean)
        if not spec.kernel_size:
            return y
        near = self._near(v, grid, weights)
        if spec.gate:
            near = near * own_share(q, k, cells)
        return y + near

    def _far(self, q: Tensor, k: Tensor, v: Tensor, cells: Cells, mean: Tensor | None) -> Tensor:
        """The global part and the mean."""
        gain = self._gain(self.gain, v)
        if cells.are_tokens or self.spec.window:
            y = global_part(self.spec, q, k, v, cells) * gain.to(v.dtype)
            return y if mean is None else y + mean.to(y.dtype)

        def change(values: Tensor) -> Tensor:
            """Cheaper on the landmarks, and the same: what a softmax weighs sums to the mean's 1."""
            values = values * gain.to(values.dtype)
            return values if mean is None else values + mean.to(values.dtype)

        return global_part(self.spec, q, k, v, cells, change)

    def _near(self, v: Tensor, grid: Grid, weights: Tensor | None) -> Tensor:
        """The local part: depth-wise convolutions of the values."""
        if weights is not None:
            v = v * weights[:, None, :, None].to(v.dtype)
        return local_part(v, grid, self.kernels, self.spec.scales)

    def _mean(self, v: Tensor, weights: Tensor | None) -> Tensor:
        """(B, heads, 1, d), float32 at least: the mean of the values times its gain."""
        dtype = torch.promote_types(v.dtype, torch.float32)
        if weights is None:
            mean = v.mean(dim=2, keepdim=True, dtype=dtype)
        else:
            shares = weights / weights.sum(dim=1, keepdim=True)
            mean = torch.einsum("bn,bhnd->bhd", shares.to(dtype), v.to(dtype))[:, :, None]
        return mean * self._gain(self.mean, mean)

    def _gain(self, gain: Tensor, like: Tensor) -> Tensor:
        """(heads, 1, d or 1), on like's device, float32 at least."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        return gain.to(like.device, dtype).reshape(self.spec.heads, 1, -1)

    def _check(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, mask: Tensor | None) -> None:
        height, width = grid
        if height < 1 or width < 1:
            raise DeltaConvError(f"expected a grid of at least 1 x 1, got {height} x {width}")
        spec, tokens = self.spec, height * width
        wanted = (spec.heads, tokens, spec.head_dim)
        if any(t.ndim != 4 or t.shape[1:] != wanted or len(t) != len(q) for t in (q, k, v)):
            raise DeltaConvError(
                f"expected queries, keys and values of shape (B, {spec.heads}, {height} x {width} = "
                f"{tokens}, {spec.head_dim}), got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}; "
                "something before this attention merges, tiles or adds tokens, or it is another layer's"
            )
        if not all(t.is_floating_point() for t in (q, k, v)):
            raise DeltaConvError(f"expected floating point tokens, got {q.dtype}, {k.dtype} and {v.dtype}")
        if mask is not None and mask.shape != (len(q), tokens):
            raise DeltaConvError(
                f"expected a mask of the keys, ({len(q)}, {tokens}), got {tuple(mask.shape)}; landmarks "
                "cannot keep keys from some queries and show them to others"
            )

    def extra_repr(self) -> str:
        """The spec, for printing."""
        return str(self.spec)
