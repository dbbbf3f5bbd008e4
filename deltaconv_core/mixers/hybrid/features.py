"""A hybrid mixer as a linear function of its parameters, for some of its queries: what a fit needs.

For every query, head and channel: y = features . w, where w are the parameters of the head or channel in the
order of `unpack`: the kernels scale by scale and row by row, the gain on the mean, the gain on the global
part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...block import ops
from ..joint.spec import JointSpec
from .cells import Cells, Grid, key_weights
from .landmarks import global_part, own_share
from .module import HybridMixer
from .spec import HybridSpec


def count(spec: HybridSpec | JointSpec) -> int:
    """F, the parameters of one head or channel."""
    return spec.num_parameters // spec.shared


def features(
    spec: HybridSpec, q: Tensor, k: Tensor, v: Tensor, grid: Grid, mask: Tensor | None, rows: Tensor
) -> Tensor:
    """(B, heads, n, F, d) for the n queries whose numbers are given.

    Args:
        spec: of the mixer.
        q, k, v, grid: as `HybridMixer` takes them; computed in their dtype.
        mask: (B, H * W) of the keys, bool or floating point; None: none.
        rows: (n,) numbers of the queries.
    """
    weights = key_weights(mask, q)
    cells = Cells.of(grid, spec.landmarks, weights, q) if spec.landmarks else None
    parts = []
    if spec.kernel_size:
        weighed = v if weights is None else v * weights[:, None, :, None].to(v.dtype)
        image = weighed.reshape(*v.shape[:2], *grid, v.shape[3])
        near = torch.cat([shifted(image, scale, spec.kernel_size, rows) for scale in spec.scales], dim=3)
        if spec.gate and cells is not None:
            near = near * own_share(q, k, cells, rows)[:, :, :, None]
        parts.append(near)
    if spec.mean:
        shares = torch.ones_like(v[:, 0, :, 0]) if weights is None else weights.to(v.dtype)
        mean = torch.einsum("bn,bhnd->bhd", shares / shares.sum(dim=1, keepdim=True), v)
        parts.append(mean[:, :, None, None].expand(-1, -1, len(rows), -1, -1))
    if cells is not None:
        parts.append(global_part(spec, q, k, v, cells, rows=rows)[:, :, :, None])
    return torch.cat(parts, dim=3)


def unpack(spec: HybridSpec, w: Tensor) -> HybridMixer:
    """The mixer with these parameters, (heads or channels, F), in float32."""
    mixer = HybridMixer(spec, device=w.device, dtype=torch.float32)
    taps = spec.kernel_size**2
    with torch.no_grad():
        if spec.kernel_size:
            for n, kernel in enumerate(mixer.kernels):
                kernel.copy_(w[:, n * taps : (n + 1) * taps].reshape(kernel.shape))
        if spec.mean:
            mixer.mean.copy_(w[:, -2 if spec.landmarks else -1])
        if spec.landmarks:
            mixer.gain.copy_(w[:, -1])
    return mixer.requires_grad_(False)


def shifted(image: Tensor, scale: float, size: int, rows: Tensor) -> Tensor:
    """(B, heads, H, W, d) -> (B, heads, n, size², d): what each tap of a kernel sees from each query."""
    batch, heads, height, width, d = image.shape
    y, x = rows // width, rows % width
    if scale == 1:
        return _taps(image, size, y, x)
    small = ops.shrink(image.flatten(0, 1).permute(0, 3, 1, 2), scale, "average")
    small = small.permute(0, 2, 3, 1).reshape(batch, heads, *small.shape[2:], d)
    (top, bottom, down), (left, right, across) = (
        _between(at, size_there, whole)
        for at, size_there, whole in ((y, small.shape[2], height), (x, small.shape[3], width))
    )
    down, across = (share.to(image.dtype)[:, None, None] for share in (down, across))
    above = (1 - across) * _taps(small, size, top, left) + across * _taps(small, size, top, right)
    below = (1 - across) * _taps(small, size, bottom, left) + across * _taps(small, size, bottom, right)
    return (1 - down) * above + down * below


def _taps(image: Tensor, size: int, y: Tensor, x: Tensor) -> Tensor:
    """(B, heads, H, W, d) -> (B, heads, n, size², d): the pixels around (y, x), zero outside."""
    radius = size // 2
    padded = torch.nn.functional.pad(image, (0, 0, radius, radius, radius, radius))
    offset = torch.arange(size, device=image.device)
    taps = (y[:, None, None] + offset[:, None]) * padded.shape[3] + x[:, None, None] + offset
    return padded.flatten(2, 3)[:, :, taps.flatten(1)]


def _between(at: Tensor, size: int, whole: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where bilinear interpolation from `size` to `whole` looks: two numbers, and the share of the second."""
    place = ((at + 0.5) * size / whole - 0.5).clamp(0, size - 1)
    low = place.floor().long()
    return low, (low + 1).clamp(max=size - 1), place - low
