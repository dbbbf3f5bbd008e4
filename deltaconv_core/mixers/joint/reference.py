"""The slow joint mixer, the specification of the fast one: formulas, one head, query and cell at a time.

Per head, with queries q_i, keys k_j and values v_j of width d, scores s(q, k) = q . k / sqrt(d), and a mask
b_ij that is added to them (0 without one; minus infinity where a key is hidden). J is the image's tokens,
E all other keys. Cells p divide the image:

    cells      n_p = sum_{j in p} w_j, K_p = sum_{j in p} w_j k_j / n_p, V_p alike, where w_j = exp(b_j) if
               the mask is one of the keys; else w_j = 1, and b_i is what row i has for all of J
    window     W_i, the tokens of J at most half a window from i in rows and in columns; empty without one.
               n_ip = n_p less the w_j of those of its tokens that are in W_i
    softmax    Z_i = sum_{e in E} exp(s(q_i, k_e) + b_ie) + sum_{j in W_i} w_j exp(s(q_i, k_j) + b_i)
                   + sum_p n_ip exp(s(q_i, K_p) + b_i)
    exact      exact_i = (sum_{e in E} exp(s(q_i, k_e) + b_ie) v_e
                   + sum_{j in W_i} w_j exp(s(q_i, k_j) + b_i) v_j) / Z_i
    landmarks  F_ip = n_ip exp(s(q_i, K_p) + b_i) / Z_i, far_i = sum_p F_ip V_p, mass m_i = sum_p F_ip
    local      near_i = sum over scales and offsets e: kappa(e) w_{i+e} v_{i+e} / max_j w_j, on averages of v
               where the scale is below 1
    mean       mu = sum_{j in J} w_j v_j / sum_{j in J} w_j

    y_i = exact_i + a far_i + m_i (near_i + g mu)     for i in J;     attention for all other queries

Where every cell is one token, a = 1, g = 0 and kappa = 0, this is attention; where the window covers the
image, whatever the parameters. Shares no code with the fast
path; plain differentiable tensor arithmetic only.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...block.reference import depthwise, shrunk, stretched
from ..hybrid.reference import cells_of, scores
from .spec import JointSpec


def reference_joint(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    start: int,
    spec: JointSpec,
    weights: Mapping[str, Tensor],
    mask: Tensor | None = None,
) -> Tensor:
    """One joint mixer in float32, or in float64 for float64 queries.

    Args:
        q: (B, heads, N, d), any floating dtype.
        k, v: (B, key heads, M, d).
        grid, start: (H, W) of the image, and the number of its first token.
        spec: what the mixer is made of.
        weights: `JointMixer.state_dict()` or named parameters.
        mask: (B, heads, N, M), each but M also 1: bool or floating point.

    Returns:
        (B, heads, N, d), float32 or float64.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    own = {name: tensor.to(dtype) for name, tensor in weights.items()}
    of_keys = mask is None or mask.shape[2] == 1
    added = torch.zeros(len(q), spec.heads, q.shape[2], k.shape[2], dtype=dtype)
    if mask is not None:
        hidden = torch.zeros(mask.shape, dtype=dtype)
        hidden = hidden.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask.to(dtype)
        added = added + hidden
    repeats = spec.heads // k.shape[1]
    return torch.stack(
        [
            torch.stack(
                [
                    _head(
                        q[b, h].to(dtype),
                        k[b, h // repeats].to(dtype),
                        v[b, h // repeats].to(dtype),
                        added[b, h],
                        of_keys,
                        (grid, start),
                        spec,
                        {name: tensor[h] for name, tensor in own.items()},
                    )
                    for h in range(spec.heads)
                ]
            )
            for b in range(len(q))
        ]
    )


def _head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    added: Tensor,
    of_keys: bool,
    place: tuple[tuple[int, int], int],
    spec: JointSpec,
    own: Mapping[str, Tensor],
) -> Tensor:
    grid, start = place
    image = list(range(start, start + grid[0] * grid[1]))
    others = [j for j in range(len(k)) if j not in image]
    w = torch.exp(added[0, image]) if of_keys else torch.ones(len(image), dtype=q.dtype)
    cells = cells_of(grid, spec.landmarks)
    sizes = torch.stack([w[cell].sum() for cell in cells])
    keys, values = (
        torch.stack(
            [w[c] @ t[image][c] / n if n > 0 else 0 * t[0] for c, n in zip(cells, sizes, strict=True)]
        )
        for t in (k, v)
    )
    relative = w / w.max() if w.max() > 0 else w
    near = _local(v[image] * relative[:, None], grid, spec, own)
    mean = w @ v[image] / w.sum() if w.sum() > 0 else 0 * v[0]
    rows = []
    for i in range(len(q)):
        if i not in image:
            rows.append(torch.softmax(scores(q[i : i + 1], k)[0] + added[i], dim=0) @ v)
            continue
        everywhere = 0 if of_keys else added[i, image[0]]
        exact = scores(q[i : i + 1], k[others])[0] + added[i, others]
        far = scores(q[i : i + 1], keys)[0] + everywhere
        around = _window(i - start, grid, spec.window)
        close = scores(q[i : i + 1], k[image][around])[0] + everywhere
        rest = torch.stack([w[[j for j in cell if j not in around]].sum() for cell in cells])
        most = torch.cat([exact, close, far]).max().detach()
        exact, close, far = (
            torch.exp(exact - most),
            w[around] * torch.exp(close - most),
            rest * torch.exp(far - most),
        )
        total = exact.sum() + close.sum() + far.sum()
        exact, close, far = exact / total, close / total, far / total
        mixed = own["gain"] * (far @ values) + far.sum() * (near[i - start] + own["mean"] * mean)
        rows.append(exact @ v[others] + close @ v[image][around] + mixed)
    return torch.stack(rows)


def _window(i: int, grid: tuple[int, int], window: int) -> list[int]:
    """Numbers of the image's tokens around one of them."""
    radius, (height, width) = window // 2, grid
    if not window:
        return []
    y, x = divmod(i, width)
    rows, columns = range(y - radius, y + radius + 1), range(x - radius, x + radius + 1)
    return [r * width + c for r in rows if 0 <= r < height for c in columns if 0 <= c < width]


def _local(v: Tensor, grid: tuple[int, int], spec: JointSpec, own: Mapping[str, Tensor]) -> Tensor:
    """(H * W, d); zero without kernels."""
    image = v.reshape(1, *grid, spec.head_dim)
    y = torch.zeros_like(image)
    for n, scale in enumerate(spec.scales if spec.kernel_size else ()):
        kernel = own[f"kernels.{n}"][None].expand(spec.head_dim, -1, -1, -1)
        if scale == 1:
            y = y + depthwise(image, kernel, None)
        else:
            y = y + stretched(depthwise(shrunk(image, scale, "average"), kernel, None), *grid)
    return y.reshape(v.shape)
