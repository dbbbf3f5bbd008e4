"""A joint mixer as a linear function of its parameters, for some of the image's queries: what a fit needs.

For every query, head and channel: y = exact + features . w, where w are the parameters of the head in the
order of `unpack_joint`: the kernels scale by scale and row by row, the gain on the mean, the gain on the
landmarks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..hybrid.features import shifted
from ..hybrid.windowed import by_query_head, outside_of, window_bias
from .module import JointMixer, SeenByImage, all_but, mean_of
from .place import JointLayout, four_dimensional
from .spec import JointSpec


def joint_features(
    spec: JointSpec, q: Tensor, k: Tensor, v: Tensor, layout: JointLayout, mask: Tensor | None, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """(B, heads, n, F, d), and what is exact of the answers, (B, heads, n, d), for n of the image's queries.

    Args:
        spec: of the mixer.
        q, k, v, layout, mask: as `JointMixer` takes them; computed in their dtype.
        rows: (n,) numbers of the queries in the image.
    """
    mask = None if mask is None else four_dimensional(mask)
    seen, image = SeenByImage.of(spec, k, v, layout, mask), layout.image
    q, scale = q[:, :, image][:, :, rows], spec.head_dim**-0.5
    exact_k, exact_v = (by_query_head(all_but(t, image), spec.heads) for t in (k, v))
    k, v = (by_query_head(t[:, :, image], spec.heads) for t in (k, v))
    keys, values = (seen.cells.means(t).to(t.dtype) for t in (k, v))
    scores = q @ torch.cat([exact_k, keys], dim=2).mT * scale
    bias = seen.added() if spec.window else seen.bias()
    bias = bias[:, :, rows] if bias.shape[2] > 1 else bias
    if spec.window:
        around, weights = _around(spec.window, seen, rows, len(q))
        near_k, near_v = (t[:, :, around] for t in (k, v))  # (B, heads, n, window², d)
        scores = torch.cat([(near_k @ q[..., None])[..., 0] * scale, scores], dim=3)
        sizes = seen.cells.sizes.expand(len(q), -1)
        bias = window_bias(weights, outside_of(sizes, seen.cells.own()[around][None], weights), bias)
    shares = (scores + bias.to(q.dtype)).softmax(dim=-1)
    among = shares[..., -keys.shape[2] :]
    exact = shares[..., -keys.shape[2] - exact_k.shape[2] : -keys.shape[2]] @ exact_v
    if spec.window:
        exact = exact + (shares[..., None, : spec.window**2] @ near_v)[..., 0, :]
    mass = among.sum(dim=3)[..., None, None]
    parts = [mass * mean_of(v, seen.weights).to(v.dtype)[:, :, :, None], (among @ values)[:, :, :, None]]
    if spec.kernel_size:
        weighed = v if seen.weights is None else v * seen.weights[:, None, :, None].to(v.dtype)
        picture = weighed.reshape(*v.shape[:2], *layout.grid, v.shape[3])
        taps = [shifted(picture, scale, spec.kernel_size, rows) for scale in spec.scales]
        parts.insert(0, mass * torch.cat(taps, dim=3))
    return torch.cat(parts, dim=3), exact


def _around(window: int, seen: SeenByImage, rows: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """The tokens in a window around each of the image's queries.

    Returns:
        (n, window²) their numbers, any where the window reaches beyond the image; (B, n, window²) their
        weights, and zero there.
    """
    height, width = seen.cells.grid
    offset = torch.arange(window, device=rows.device) - window // 2
    y = (rows // width)[:, None, None] + offset[:, None]
    x = (rows % width)[:, None, None] + offset
    there = ((y >= 0) & (y < height) & (x >= 0) & (x < width)).flatten(1)
    around = (y.clamp(0, height - 1) * width + x.clamp(0, width - 1)).flatten(1)
    weights = there.to(seen.cells.sizes.dtype).expand(batch, -1, -1)
    return around, weights if seen.weights is None else weights * seen.weights[:, around]


def unpack_joint(spec: JointSpec, w: Tensor) -> JointMixer:
    """The mixer with these parameters, (heads, F), in float32."""
    mixer = JointMixer(spec, device=w.device, dtype=torch.float32)
    taps = spec.kernel_size**2
    with torch.no_grad():
        if spec.kernel_size:
            for n, kernel in enumerate(mixer.kernels):
                kernel.copy_(w[:, n * taps : (n + 1) * taps].reshape(kernel.shape))
        mixer.mean.copy_(w[:, -2])
        mixer.gain.copy_(w[:, -1])
    return mixer.requires_grad_(False)
