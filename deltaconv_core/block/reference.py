"""The slow block, the specification of the fast one: the formulas written out, one row or tap at a time.

Steps and names follow Dong et al., arXiv 2504.21292, section 4, with the variants of the authors' code where
`BlockSpec` has them. Shares no code with `block.py` and `ops`; plain differentiable tensor arithmetic only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .spec import BlockSpec


def reference_block(
    x: Tensor, grid: tuple[int, int], spec: BlockSpec, weights: Mapping[str, Tensor]
) -> Tensor:
    """One ΔConvBlock in float32, or in float64 for float64 tokens.

    Args:
        x: (B, H * W, C), any floating dtype.
        grid: (H, W).
        spec: what the block is made of.
        weights: `DeltaConvBlock.state_dict()` or named parameters, any floating dtype.

    Returns:
        (B, H * W, C), float32 or float64.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    w = {name: tensor.to(dtype) for name, tensor in weights.items()}
    height, width = grid
    x = x.to(dtype).reshape(x.shape[0], height, width, spec.dim)

    z = x @ w["conv_up.weight"].T + w["conv_up.bias"]  # section 4: 1x1 convolution C -> C_in
    stages = []
    for i, scale in enumerate(spec.scales):  # section 4: pyramid stage i
        f = z if scale == 1 else shrunk(z, scale, spec.pooling)
        f = depthwise(f, w[f"gates.{i}.conv_spatial.weight"], w.get(f"gates.{i}.conv_spatial.bias"))
        f = gated(f, spec.gate)
        stages.append(f if scale == 1 else stretched(f, height, width))
    if spec.context:
        a, b = gated(z, spec.gate), z[..., spec.inter // 2 :]
        mean = a.sum(dim=(1, 2), keepdim=True) / (height * width)
        stages.append(gated(torch.cat([mean.expand_as(b), b], dim=3), spec.gate))  # not in the paper
    if spec.merge == "sum":
        merged = stages[0]
        for stage in stages[1:]:  # formula 3
            merged = merged + stage
    else:
        merged = torch.cat(stages, dim=3)  # authors' code
    local = merged @ w["conv_out.weight"].T + w["conv_out.bias"]  # section 4: 1x1 convolution back to C

    mean = x.sum(dim=(1, 2)) / (height * width)  # section 4: low-frequency branch
    everywhere = mean @ w["conv_pool.weight"].T + w["conv_pool.bias"]
    return (local + everywhere[:, None, None, :]).reshape(x.shape[0], height * width, spec.dim)


def shrunk(z: Tensor, scale: float, pooling: str) -> Tensor:
    """(B, H, W, c) -> (B, h, w, c) with h = max(1, int(H * scale)), w alike."""
    height, width = z.shape[1:3]
    h, w = max(1, int(height * scale)), max(1, int(width * scale))
    if pooling == "average":
        rows = [z[:, a:b].mean(dim=1) for a, b in windows(height, h)]
        z = torch.stack(rows, dim=1)
        return torch.stack([z[:, :, a:b].mean(dim=2) for a, b in windows(width, w)], dim=2)
    z = sampled(z, [(i + 0.5) / scale - 0.5 for i in range(h)], dim=1)
    return sampled(z, [(i + 0.5) / scale - 0.5 for i in range(w)], dim=2)


def windows(size: int, parts: int) -> list[tuple[int, int]]:
    """Adaptive pooling: part i averages [floor(i * size / parts), ceil((i + 1) * size / parts))."""
    return [(i * size // parts, -((-(i + 1) * size) // parts)) for i in range(parts)]


def stretched(f: Tensor, height: int, width: int) -> Tensor:
    """(B, h, w, c) -> (B, height, width, c), bilinear, corners not aligned."""
    h, w = f.shape[1:3]
    f = sampled(f, [(i + 0.5) * h / height - 0.5 for i in range(height)], dim=1)
    return sampled(f, [(i + 0.5) * w / width - 0.5 for i in range(width)], dim=2)


def sampled(f: Tensor, positions: list[float], dim: int) -> Tensor:
    """Linear interpolation of f at positions along dim; positions outside repeat the border."""
    last = f.shape[dim] - 1
    out = []
    for position in positions:
        position = min(max(position, 0.0), float(last))
        low = math.floor(position)
        high = min(low + 1, last)
        share = position - low
        out.append((1 - share) * f.select(dim, low) + share * f.select(dim, high))
    return torch.stack(out, dim=dim)


def depthwise(f: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """K x K depth-wise cross-correlation of (B, h, w, c) with zeros around; kernel (c, 1, K, K), bias (c)."""
    h, w = f.shape[1:3]
    size = kernel.shape[-1]
    border = size // 2
    padded = f.new_zeros(f.shape[0], h + 2 * border, w + 2 * border, f.shape[3])
    padded[:, border : border + h, border : border + w] = f
    out = torch.zeros_like(f)
    for dy in range(size):
        for dx in range(size):
            out = out + padded[:, dy : dy + h, dx : dx + w] * kernel[:, 0, dy, dx]
    return out if bias is None else out + bias


def gated(f: Tensor, kind: str) -> Tensor:
    """rho(f): (B, h, w, c) -> (B, h, w, c / 2)."""
    channels = f.shape[3]
    a, b = f[..., : channels // 2], f[..., channels // 2 :]
    if kind == "simple":
        return a * b * math.sqrt(channels / 2)  # authors' code
    if kind == "sigmoid":
        return a / (1 + torch.exp(-b))  # authors' code, PixArt
    return a * b / math.sqrt(channels)  # section 4: scaled simple gate
