"""A joint mixer as a linear function of its parameters, for some of the image's queries: what a fit needs.

For every query, head and channel: y = exact + features . w, where w are the parameters of the head in the
order of `unpack_joint`: the kernels scale by scale and row by row, the gain on the mean, the gain on the
landmarks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..hybrid.features import shifted
from ..hybrid.windowed import less, window_bias
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
    seen, image, repeats = SeenByImage.of(spec, k, v, layout, mask), layout.image, spec.heads // k.shape[1]
    q = q[:, :, image][:, :, rows]
    k, v = (t.repeat_interleave(repeats, dim=1) for t in (k, v))
    keys, values = (seen.cells.means(t[:, :, image]).to(t.dtype) for t in (k, v))
    exact_k, exact_v = (all_but(t, image) for t in (k, v))
    own = v[:, :, image]
    scores = q @ torch.cat([exact_k, keys], dim=2).mT / spec.head_dim**0.5
    bias = seen.added() if spec.window else seen.bias()
    bias = bias[:, :, rows] if bias.shape[2] > 1 else bias
    window = 0
    if spec.window:
        around, inside = _around(spec.window, seen, rows)
        near_k, near_v = (t[:, :, image][:, :, around] for t in (k, v))  # (B, heads, n, window², d)
        near = (near_k @ q[..., None])[..., 0] / spec.head_dim**0.5
        scores, window = torch.cat([near, scores], dim=3), near.shape[3]
        own_cells = seen.cells.own()[around].expand(len(inside), -1, -1)
        of_cells = inside.new_zeros(*inside.shape[:2], keys.shape[2]).scatter_add(2, own_cells, inside)
        bias = window_bias(inside, less(seen.cells.sizes[:, None], of_cells), bias)
    shares = (scores + bias.to(q.dtype)).softmax(dim=-1)
    near, exact, among = shares.split([window, exact_k.shape[2], keys.shape[2]], dim=3)
    answers = exact @ exact_v
    if spec.window:
        answers = answers + (near[..., None, :] @ near_v)[..., 0, :]
    mass = among.sum(dim=3)[..., None, None]
    parts = [mass * mean_of(own, seen.weights).to(v.dtype)[:, :, :, None], (among @ values)[:, :, :, None]]
    if spec.kernel_size:
        weighed = own if seen.weights is None else own * seen.weights[:, None, :, None].to(v.dtype)
        picture = weighed.reshape(*own.shape[:2], *layout.grid, own.shape[3])
        near = [shifted(picture, scale, spec.kernel_size, rows) for scale in spec.scales]
        parts.insert(0, mass * torch.cat(near, dim=3))
    return torch.cat(parts, dim=3), answers


def _around(window: int, seen: SeenByImage, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens in a window around each of the image's queries.

    Returns:
        (n, window²) their numbers, any where the window reaches beyond the image; (B or 1, n, window²) their
        weights, and zero there.
    """
    height, width = seen.cells.grid
    offset = torch.arange(window, device=rows.device) - window // 2
    y = (rows // width)[:, None, None] + offset[:, None]
    x = (rows % width)[:, None, None] + offset
    there = ((y >= 0) & (y < height) & (x >= 0) & (x < width)).flatten(1)
    around = (y.clamp(0, height - 1) * width + x.clamp(0, width - 1)).flatten(1)
    inside = there.to(seen.cells.sizes.dtype)[None]
    return around, inside if seen.weights is None else inside * seen.weights[:, around]


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
