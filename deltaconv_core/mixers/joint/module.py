"""JointMixer: what stands in for the attention of text and image to both, behind its own projections.

Text, padding, references and keys from elsewhere stay exact. Only what the image's queries see of the image
itself is replaced: by a fixed number of landmarks in the same softmax, beside a window of single tokens where
there is one, and by static kernels on the values of what is near, weighed with the landmarks' mass in that
softmax. So the cost is linear in the image's tokens.
`reference.py` has the formulas and is the specification of this fast path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...block import ops
from ...errors import DeltaConvError
from ..hybrid.cells import Cells
from ..hybrid.windowed import HIDDEN, by_query_head, windowed_attention
from ..local import local_part
from .place import JointLayout, four_dimensional, refusal_of_mask
from .spec import JointSpec
from .tiles import tiled_convolution

ADDED_COLUMNS = 8  # added to queries, keys and values, whose width stays a multiple of 8 for the fast kernels

MaskedAttention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(q, k, v, mask) -> (B, heads, N, d)."""


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's, also with fewer heads of keys than of queries."""
    k, v = (by_query_head(part, q.shape[1]) for part in (k, v))  # PyTorch does that itself since 2.5
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class JointMixer(nn.Module):
    """Mixes queries, keys and values of text and image as attention does.

    A fresh one is attention with landmarks for the image: gains of 1, no kernels, nothing of the mean.

    Args:
        spec: what the mixer is made of.
        device, dtype: of the parameters, which are few; they are moved and cast to what each call needs.

    Example:
        >>> mixer = JointMixer(JointSpec(dim=64, heads=2, head_dim=32))
        >>> q, k, v = torch.randn(3, 1, 2, 20 + 15 * 20, 32)
        >>> mixer(q, k, v, JointLayout((15, 20), start=20)).shape
        torch.Size([1, 2, 320, 32])
    """

    kind = "joint"

    def __init__(
        self,
        spec: JointSpec,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.spec = spec
        self.gain = nn.Parameter(torch.ones(spec.heads, **factory))
        self.mean = nn.Parameter(torch.zeros(spec.heads, **factory))
        if spec.kernel_size:
            shape = (spec.heads, 1, spec.kernel_size, spec.kernel_size)
            self.kernels = nn.ParameterList(torch.zeros(shape, **factory) for _ in spec.scales)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: JointLayout,
        mask: Tensor | None = None,
        attend: MaskedAttention = attention,
    ) -> Tensor:
        """What attention would answer, about; to all queries but the image's, exactly.

        Args:
            q: (B, heads, N, d), rotated already where the model has rotary embeddings; any strides.
            k, v: (B, key heads, M, d), M at least what the layout asks for; key heads divide the heads.
            layout: where the image is.
            mask: (N, M), (B, N, M) or (B, heads, N, M), each but M also 1: bool, True where a key counts; or
                floating point, added to the scores. See `refusal_of_mask`.
            attend: the attention for the exact queries.

        Returns:
            (B, heads, N, d) in q's dtype.

        Raises:
            DeltaConvError: tokens or a mask that do not fit the layout or the mixer.
        """
        mask = None if mask is None else four_dimensional(mask)
        self._check(q, k, v, layout, mask)
        if not len(q):
            return q.clone()
        start, end = layout.image.start, layout.image.stop
        image = self.image(q[:, :, start:end], k, v, layout, mask)
        if start == 0 and end == q.shape[2]:
            return image
        rest = torch.cat([q[:, :, :start], q[:, :, end:]], dim=2)
        if mask is not None and mask.shape[2] > 1:
            mask = torch.cat([mask[:, :, :start], mask[:, :, end:]], dim=2)
        exact = attend(rest, k, v, mask)
        return torch.cat([exact[:, :, :start], image, exact[:, :, start:]], dim=2)

    def image(self, q: Tensor, k: Tensor, v: Tensor, layout: JointLayout, mask: Tensor | None) -> Tensor:
        """(B, heads, H * W, d): the answers to the image's queries alone; `mask` is four-dimensional."""
        spec, image, heads = self.spec, layout.image, self.spec.heads
        seen = SeenByImage.of(spec, k, v, layout, mask)
        weights, cells = seen.weights, seen.cells
        exact_k, exact_v = (by_query_head(all_but(t, image), heads) for t in (k, v))
        k, v = k[:, :, image], v[:, :, image]
        keys, values = (by_query_head(cells.means(t), heads) for t in (k, v))
        values = values * self._of_heads(self.gain, values)
        values = values + self._of_heads(self.mean, values) * self._mean(v, weights)
        keys = torch.cat([exact_k, keys.to(k.dtype)], dim=2)
        values = torch.cat([exact_v, values.to(v.dtype)], dim=2)
        if spec.kernel_size or not spec.window:
            values = marked(values, exact_k.shape[2])
        if spec.window:
            y = windowed_attention(q, k, v, cells, spec.window, keys, values, seen.added())
        else:
            y = weighed(q, keys, values, seen.bias())
        y, mass = y[..., : spec.head_dim], y[..., spec.head_dim : spec.head_dim + 1]
        if not spec.kernel_size:
            return y
        return y + mass * self._near(v, layout.grid, weights).to(y.dtype)

    def _near(self, v: Tensor, grid: tuple[int, int], weights: Tensor | None) -> Tensor:
        """The local part: depth-wise convolutions of the image's values (B, key heads, H * W, d)."""
        spec = self.spec
        v = v.to(ops.compute_dtype(v[:, 0]))
        if weights is not None:
            v = v * weights[:, None, :, None].to(v.dtype)
        v = by_query_head(v, spec.heads)
        if v.device.type == "cuda" and spec.scales == (1.0,):
            # cuDNN's depth-wise convolution would take ten times as long.
            image = v.reshape(len(v), spec.heads, *grid, spec.head_dim)
            return tiled_convolution(image, self.kernels[0][:, 0]).flatten(2, 3)
        return local_part(v, grid, self.kernels, spec.scales)

    def _mean(self, v: Tensor, weights: Tensor | None) -> Tensor:
        """(B, heads, 1, d), float32 at least: the mean of the image's values."""
        return by_query_head(mean_of(v, weights), self.spec.heads)

    def _of_heads(self, gain: Tensor, like: Tensor) -> Tensor:
        """(heads, 1, 1), on like's device and in its dtype."""
        return gain.to(like.device, like.dtype)[:, None, None]

    def _check(self, q: Tensor, k: Tensor, v: Tensor, layout: JointLayout, mask: Tensor | None) -> None:
        spec, end = self.spec, layout.image.stop
        fits = all(t.ndim == 4 and len(t) == len(q) and t.shape[3] == spec.head_dim for t in (q, k, v))
        if not fits or q.shape[1] != spec.heads or k.shape != v.shape or spec.heads % k.shape[1]:
            raise DeltaConvError(
                f"expected queries (B, {spec.heads}, N, {spec.head_dim}), and keys and values alike whose "
                f"heads divide {spec.heads}, got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}; "
                "something before this attention changes its tokens, or the mixer is another layer's"
            )
        if min(q.shape[2], k.shape[2]) < end:
            raise DeltaConvError(
                f"expected at least {end} queries and keys: an image of {layout.grid[0]} x {layout.grid[1]} "
                f"tokens after {layout.start} others; got {q.shape[2]} and {k.shape[2]}"
            )
        if not all(t.is_floating_point() for t in (q, k, v)):
            raise DeltaConvError(f"expected floating point tokens, got {q.dtype}, {k.dtype} and {v.dtype}")
        if mask is None:
            return
        wanted = (len(q), spec.heads, q.shape[2], k.shape[2])
        if mask.shape[3] != wanted[3] or any(own not in (1, n) for own, n in zip(mask.shape, wanted)):  # noqa: B905 (both have four)
            raise DeltaConvError(
                f"expected a mask of {wanted}, or 1 in place of all but the last, got {tuple(mask.shape)}"
            )
        if why := refusal_of_mask(mask, layout):
            raise DeltaConvError(f"no landmark can stand in for the image's keys here: {why}")

    def extra_repr(self) -> str:
        """The spec, for printing."""
        return str(self.spec)


class SeenByImage:
    """What the image's queries see, under a mask.

    Attributes:
        cells: that the landmarks are taken of.
        weights: (B, H * W) of the image's keys; None: all alike.
        exact: (B or 1, heads or 1, H * W or 1, exact keys) that is added to their scores.
        image: (B or 1, heads or 1, H * W or 1, 1) that is added to the scores of all the image's keys.
    """

    def __init__(self, cells: Cells, weights: Tensor | None, exact: Tensor, image: Tensor) -> None:
        self.cells, self.weights, self.exact, self.image = cells, weights, exact, image

    @classmethod
    def of(
        cls, spec: JointSpec, k: Tensor, v: Tensor, layout: JointLayout, mask: Tensor | None
    ) -> SeenByImage:
        """Arguments as `JointMixer.image` takes them."""
        dtype, image = torch.promote_types(k.dtype, torch.float32), layout.image
        if mask is None:
            cells = Cells.of(layout.grid, spec.landmarks, None, k)
            exact = torch.zeros(1, 1, 1, k.shape[2] - layout.tokens, device=k.device, dtype=dtype)
            return cls(cells, None, exact, exact.new_zeros(1, 1, 1, 1))
        added = _added(mask, dtype)
        if added.shape[2] > 1:
            added = added[:, :, image]
            cells = Cells.of(layout.grid, spec.landmarks, None, k)
            return cls(cells, None, all_but(added, image, 3), added[..., image.start : image.start + 1])
        of_keys = added[:, 0, 0, image].expand(len(k), -1)
        most = of_keys.amax(dim=1, keepdim=True).clamp(min=HIDDEN)
        weights = (of_keys - most).exp()
        cells = Cells.of(layout.grid, spec.landmarks, weights, k)
        return cls(cells, weights, all_but(added, image, 3), most[:, None, None])

    def bias(self) -> Tensor:
        """(B or 1, heads or 1, H * W or 1, exact keys + P) for exact keys and landmarks."""
        return _clamped(self.exact, self.cells.sizes.log()[:, None, None] + self.image)

    def added(self) -> Tensor:
        """What `windowed_attention` takes."""
        return _clamped(self.exact, self.image)


def marked(values: Tensor, exact: int) -> Tensor:
    """(B, heads, exact + P, d) with more columns, of which the first says which are landmarks: so attention
    to them also tells the share that the landmarks have in its softmax."""
    mark = values.new_zeros(values.shape[2], ADDED_COLUMNS)
    mark[exact:, 0] = 1
    return torch.cat([values, mark.expand(*values.shape[:2], -1, -1)], dim=3)


def weighed(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Softmax of the image's queries over exact keys and landmarks.

    The bias, where it is one of the keys, is two columns of the keys: so no mask keeps PyTorch's fastest
    kernels away.

    Args:
        q: (B, heads, n, d).
        keys: (B, heads, exact + P, d).
        values: of the keys, `marked`.
        bias: see `SeenByImage`.

    Returns:
        (B, heads, n, width of the values).
    """
    d = q.shape[3]
    mask = None
    if bias.shape[1:3] == (1, 1):
        whole = bias[:, 0, 0] * d**0.5
        # Of heads above 171 channels, float16 does not hold the root of d times HIDDEN in one number.
        high = whole.clamp(min=torch.finfo(keys.dtype).min).to(keys.dtype)
        columns = torch.stack([high, (whole - high.to(whole.dtype)).to(keys.dtype)], dim=2)  # (B or 1, M, 2)
        columns = F.pad(columns, (0, ADDED_COLUMNS - 2))[:, None]
        keys = torch.cat([keys, columns.expand(*keys.shape[:3], -1)], dim=3)
        q = F.pad(q, (0, ADDED_COLUMNS), value=1.0)
    else:
        mask = bias.to(q.dtype)
        keys, q = F.pad(keys, (0, ADDED_COLUMNS)), F.pad(q, (0, ADDED_COLUMNS))
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=d**-0.5)


def all_but(tokens: Tensor, image: slice, dim: int = 2) -> Tensor:
    """The tokens that are not the image's."""
    before = tokens.narrow(dim, 0, image.start)
    after = tokens.narrow(dim, image.stop, tokens.shape[dim] - image.stop)
    return torch.cat([before, after], dim=dim) if image.start else after


def mean_of(v: Tensor, weights: Tensor | None) -> Tensor:
    """(B, heads, 1, d), float32 at least: the mean of values (B, heads, H * W, d), weighed."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    if weights is None:
        return v.mean(dim=2, keepdim=True, dtype=dtype)
    shares = weights / weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return torch.einsum("bn,bhnd->bhd", shares.to(dtype), v.to(dtype))[:, :, None]


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as what is added to the scores. Where it puts all keys far below zero, none is hidden."""
    if mask.dtype != torch.bool:
        mask = mask.to(dtype)
        most = mask.amax(dim=3, keepdim=True).clamp(min=torch.finfo(dtype).min)
        return mask - torch.where(most < HIDDEN / 2, most, 0)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, HIDDEN)


def _clamped(exact: Tensor, among: Tensor) -> Tensor:
    """Both biases, of exact keys and of landmarks, side by side and finite."""
    shape = [max(a, b) for a, b in zip(exact.shape[:3], among.shape[:3], strict=True)]
    both = torch.cat([t.expand(*shape, t.shape[3]) for t in (exact, among)], dim=3)
    return both.clamp(min=HIDDEN)
