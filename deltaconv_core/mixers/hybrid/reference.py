"""The slow hybrid mixer, the specification of the fast one: formulas, one head, cell and offset at a time.

Per head, with queries q_i, keys k_j and values v_j of width d on an H x W grid, and weights w_j of the keys
(1 without a mask), scores s(q, k) = q . k / sqrt(d), and softmax with weights n, softmax_p(s; n) =
n_p exp(s_p) / sum_r n_r exp(s_r):

    cells      the picture in P rectangles: n_p = sum_{j in p} w_j, K_p = sum_{j in p} w_j k_j / n_p, V_p and
               Q_p alike
    landmarks  F_ip = softmax_p(s(q_i, K_p); n)                        global_i = sum_p F_ip V_p
    Nyström    A_pr = softmax_r(s(Q_p, K_r); n)
               M_p = sum_j softmax_j(s(Q_p, k_j); w) v_j               global_i = sum_p F_ip (A+ M)_p
    window     one softmax over the tokens around i, with w, and over the cells, with n_p less the weights of
               those of its tokens that are in the window
    local      sum over scales and offsets e: kappa(e) w_{i+e} v_{i+e}, on averages of v where the scale is
               below 1; with a gate times F_ip of the query's own cell
    mean       sum_j w_j v_j / sum_j w_j

    y_i = a * global_i + local_i + g * mean

A+ is (A^T A + RIDGE)^-1 A^T, or NEWTON_STEPS of Newton–Schulz (Xiong et al., "Nyströmformer", AAAI 2021,
arXiv 2102.03902, equation 11). Where every cell is one token, all formulas of the global part are attention;
there Nyström's correction, which is exact but for its inverse, is left out. Shares no code with the fast
path; plain differentiable tensor arithmetic only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ...block.reference import depthwise, shrunk, stretched
from .spec import HybridSpec

RIDGE = 1e-3
NEWTON_STEPS = 6

Cell = list[int]  # the numbers of its tokens


def reference_hybrid(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    spec: HybridSpec,
    weights: Mapping[str, Tensor],
    mask: Tensor | None = None,
) -> Tensor:
    """One hybrid mixer in float32, or in float64 for float64 queries.

    Args:
        q, k, v: (B, heads, H * W, d), any floating dtype.
        grid: (H, W).
        spec: what the mixer is made of.
        weights: `HybridMixer.state_dict()` or named parameters, any floating dtype.
        mask: (B, H * W) of the keys: bool, True where one counts; or floating point, added to the scores.

    Returns:
        (B, heads, H * W, d), float32 or float64.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    own = {name: tensor.to(dtype) for name, tensor in weights.items()}
    pictures = []
    for b in range(len(q)):
        w = q.new_ones(q.shape[2], dtype=dtype)
        if mask is not None:
            own_mask = mask[b].to(dtype)
            w = own_mask if mask.dtype == torch.bool else torch.exp(own_mask - own_mask.max())
        heads = []
        for h in range(spec.heads):
            gains = {name: _of_head(tensor, h, spec) for name, tensor in own.items()}
            heads.append(_head(q[b, h].to(dtype), k[b, h].to(dtype), v[b, h].to(dtype), w, grid, spec, gains))
        pictures.append(torch.stack(heads))
    return torch.stack(pictures)


def _of_head(tensor: Tensor, head: int, spec: HybridSpec) -> Tensor:
    """The kernels or gains of a head's d channels, (d, ...)."""
    if spec.share == "channel":
        return tensor[head * spec.head_dim : (head + 1) * spec.head_dim]
    return tensor[head : head + 1].expand(spec.head_dim, *tensor.shape[1:])


def _head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    grid: tuple[int, int],
    spec: HybridSpec,
    gains: Mapping[str, Tensor],
) -> Tensor:
    y = torch.zeros_like(v)
    shares = None
    cells = cells_of(grid, spec.landmarks) if spec.landmarks else []
    if spec.landmarks:
        if spec.window:
            far = _windowed(q, k, v, w, grid, cells, spec.window)
        elif spec.nystrom != "none" and len(cells) < len(q):
            far = _nystrom(q, k, v, w, cells, spec.nystrom)
        else:
            sizes, keys, values = _sizes(w, cells), _means(k, w, cells), _means(v, w, cells)
            shares = softmax(scores(q, keys), sizes)
            far = shares @ values
        y = y + gains["gain"] * far
    if spec.kernel_size:
        near = _local(v * w[:, None], grid, spec, gains)
        if spec.gate and shares is not None:
            near = (
                near
                * torch.stack(
                    [sum((shares[i, p] for p, cell in enumerate(cells) if i in cell)) for i in range(len(q))]  # type: ignore[misc]
                )[:, None]
            )
        y = y + near
    if spec.mean:
        y = y + gains["mean"] * (w @ v) / w.sum()
    return y


def cells_of(grid: tuple[int, int], landmarks: int) -> list[Cell]:
    """The cells from left to right and top to bottom: about as high as wide, rows * columns <= landmarks."""
    height, width = grid
    rows = min(max(1, round(math.sqrt(landmarks * height / width))), height, landmarks)
    columns = min(max(1, landmarks // rows), width)
    cells: list[Cell] = []
    for r in range(rows):
        for c in range(columns):
            cell = []
            for y in range(r * height // rows, (r + 1) * height // rows):
                cell += [y * width + x for x in range(c * width // columns, (c + 1) * width // columns)]
            cells.append(cell)
    return cells


def scores(q: Tensor, k: Tensor) -> Tensor:
    """(n, d) and (m, d) -> (n, m)."""
    return q @ k.T / math.sqrt(q.shape[1])


def softmax(logits: Tensor, weights: Tensor) -> Tensor:
    """Over the last dimension, each entry weighed."""
    shares: Tensor = weights * torch.exp(logits - logits.max(dim=-1, keepdim=True).values)
    total: Tensor = shares.sum(dim=-1, keepdim=True)
    return shares / total


def _sizes(w: Tensor, cells: list[Cell]) -> Tensor:
    return torch.stack([w[cell].sum() for cell in cells])


def _means(t: Tensor, w: Tensor, cells: list[Cell]) -> Tensor:
    """(P, d); zero where a cell has no weight."""
    rows = []
    for cell in cells:
        size = w[cell].sum()
        rows.append((w[cell] @ t[cell]) / size if size > 0 else torch.zeros_like(t[0]))
    return torch.stack(rows)


def _nystrom(q: Tensor, k: Tensor, v: Tensor, w: Tensor, cells: list[Cell], how: str) -> Tensor:
    sizes, queries, keys = _sizes(w, cells), _means(q, w, cells), _means(k, w, cells)
    a = softmax(scores(queries, keys), sizes)
    m = softmax(scores(queries, k), w) @ v
    eye = torch.eye(len(cells), dtype=a.dtype, device=a.device)
    corrected: Tensor
    if how == "cholesky":
        corrected = torch.linalg.solve(a.T @ a + RIDGE * eye, a.T @ m)
    else:
        z = a.T / (a.abs().sum(dim=0).max() * a.abs().sum(dim=1).max())
        for _ in range(NEWTON_STEPS):
            az = a @ z
            z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
        corrected = z @ m
    return softmax(scores(q, keys), sizes) @ corrected


def _windowed(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, grid: tuple[int, int], cells: list[Cell], window: int
) -> Tensor:
    height, width = grid
    keys, values = _means(k, w, cells), _means(v, w, cells)
    rows = []
    for i in range(len(q)):
        y, x = divmod(i, width)
        radius = window // 2
        near = [
            r * width + c
            for r in range(max(0, y - radius), min(height, y + radius + 1))
            for c in range(max(0, x - radius), min(width, x + radius + 1))
        ]
        rest = [[j for j in cell if j not in near] for cell in cells]
        logits = torch.cat([scores(q[i : i + 1], k[near]), scores(q[i : i + 1], keys)], dim=1)
        shares = softmax(logits, torch.cat([w[near], _sizes(w, rest)]))
        rows.append(shares @ torch.cat([v[near], values]))
    return torch.cat(rows)


def _local(v: Tensor, grid: tuple[int, int], spec: HybridSpec, gains: Mapping[str, Tensor]) -> Tensor:
    image = v.reshape(1, *grid, spec.head_dim)
    y = torch.zeros_like(image)
    for n, scale in enumerate(spec.scales):
        kernel = gains[f"kernels.{n}"]
        if scale == 1:
            y = y + depthwise(image, kernel, None)
        else:
            y = y + stretched(depthwise(shrunk(image, scale, "average"), kernel, None), *grid)
    return y.reshape(v.shape)
