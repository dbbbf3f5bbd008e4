"""The block of the ΔConv authors in plain operations, and its weights under the names of their files.

Written from the description of their release alone; nothing of this repository's block is used, so that
agreement between the two means something. Resizing is by explicit matrices for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]
EARLIER_NAMES = {"gates.0.conv_spatial": "conv_spatial", "gates.1.conv_spatial": "conv_spatial_low"}


def release(weights: Weights) -> Weights:
    """The current release: Linear projections, depth-wise kernels [K, K, channels]."""
    return {name: w[:, 0].permute(1, 2, 0).contiguous() if w.ndim == 4 else w for name, w in weights.items()}


def conv2d(weights: Weights) -> Weights:
    """The plain-PyTorch twin: projections as 1x1 convolutions, kernels [channels, 1, K, K]."""
    return {name: w[:, :, None, None] if w.ndim == 2 else w for name, w in weights.items()}


def earlier(weights: Weights) -> Weights:
    """The earlier block: two stages, named each for itself, and convolutions throughout."""
    named = ((name.rsplit(".", 1), w) for name, w in conv2d(weights).items())
    return {f"{EARLIER_NAMES.get(layer, layer)}.{kind}": w for (layer, kind), w in named}


@dataclass(frozen=True)
class Form:
    """One form in which files of the authors are published.

    Args:
        name: for the table.
        layout: from the weights as `random_weights` names and shapes them to the file's.
        gate: "simple" or "sigmoid".
        prefix: before every key of the file.
        scales: of the stages.
        pooling: how the smaller stages are reached, "average" or "bilinear".
        spatial_bias: whether the depth-wise convolutions have biases.
    """

    name: str
    layout: Callable[[Weights], Weights]
    gate: str
    prefix: str = ""
    scales: tuple[float, ...] = (1.0, 0.5)
    pooling: str = "average"
    spatial_bias: bool = False


def published(blocks: dict[str, Weights], base: dict[str, Tensor], form: Form) -> dict[str, Tensor]:
    """The tensors of the authors' file."""
    named = {
        f"{id}.conv1.{key}": tensor
        for id, weights in blocks.items()
        for key, tensor in form.layout(weights).items()
    }
    return {f"{form.prefix}{key}": tensor for key, tensor in (named | base).items()}


def random_weights(channels: int, kernel_size: int, form: Form) -> Weights:
    """Weights of one block that keep unit variance inside and give outputs as large as an attention's."""
    inter = channels // 2
    shapes: dict[str, tuple[int, ...]] = {
        "conv_up": (inter, channels),
        "conv_out": (channels, inter // 2 * len(form.scales)),
        "conv_pool": (channels, channels),
    }
    shapes |= {
        f"gates.{i}.conv_spatial": (inter, 1, kernel_size, kernel_size) for i in range(len(form.scales))
    }
    weights = {f"{name}.weight": scaled_noise(shape) for name, shape in shapes.items()}
    if form.gate == "simple":
        weights["conv_out.weight"] /= (inter / 2) ** 0.5  # what the gate multiplies by
    weights["conv_pool.weight"] *= 3  # the mean of many tokens is small
    weights |= {
        f"{name}.bias": 0.1 * torch.randn(shape[0])
        for name, shape in shapes.items()
        if form.spatial_bias or "spatial" not in name
    }
    return weights


def scaled_noise(shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Normal numbers that keep the variance of what they are multiplied with."""
    return torch.randn(shape) / max(1, torch.Size(shape[1:]).numel()) ** 0.5


def block(w: Weights, x: Tensor, form: Form) -> Tensor:
    """(B, H, W, C) -> (B, H, W, C), the input being normalized already."""
    height, width = x.shape[1:3]
    z = F.linear(x, w["conv_up.weight"], w.get("conv_up.bias")).permute(0, 3, 1, 2)
    half = z.shape[1] // 2
    stages = []
    for i, scale in enumerate(form.scales):
        f = z if scale == 1 else shrink(z, scale, form.pooling)
        kernel = w[f"gates.{i}.conv_spatial.weight"]
        bias = w.get(f"gates.{i}.conv_spatial.bias")
        f = F.conv2d(f, kernel, bias, padding=kernel.shape[-1] // 2, groups=2 * half)
        a, b = f[:, :half], f[:, half:]
        f = a * b * half**0.5 if form.gate == "simple" else a * torch.sigmoid(b)
        stages.append(f if scale == 1 else enlarge(f, height, width))
    joined = torch.cat(stages, dim=1).permute(0, 2, 3, 1)
    mean = F.linear(x.mean(dim=(1, 2), keepdim=True), w["conv_pool.weight"], w.get("conv_pool.bias"))
    return F.linear(joined, w["conv_out.weight"], w.get("conv_out.bias")) + mean


def shrink(z: Tensor, scale: float, pooling: str) -> Tensor:
    """(B, c, H, W) -> (B, c, int(H * scale), int(W * scale)), each at least 1."""
    sizes = [(side, max(1, int(side * scale))) for side in z.shape[2:]]
    if pooling == "average":
        return resize(z, *(averages(*size) for size in sizes))
    return resize(z, *(bilinear(*size, step=1 / scale) for size in sizes))


def enlarge(f: Tensor, height: int, width: int) -> Tensor:
    """(B, c, h, w) -> (B, c, H, W), bilinear, corners not aligned."""
    sizes = ((f.shape[2], height), (f.shape[3], width))
    return resize(f, *(bilinear(old, new, step=old / new) for old, new in sizes))


def resize(f: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(B, c, h, w) -> (B, c, H, W) by (H, h) and (W, w)."""
    return rows.to(f) @ f @ columns.to(f).T


def averages(size: int, target: int) -> Tensor:
    """(target, size) of adaptive pooling, whose windows overlap where the sizes do not divide."""
    matrix = torch.zeros(target, size)
    for i in range(target):
        start, end = i * size // target, -(-(i + 1) * size // target)
        matrix[i, start:end] = 1 / (end - start)
    return matrix


def bilinear(size: int, target: int, step: float) -> Tensor:
    """(target, size) of linear interpolation at (i + 1/2) * step - 1/2."""
    matrix = torch.zeros(target, size)
    for i in range(target):
        position = min(max((i + 0.5) * step - 0.5, 0.0), size - 1.0)
        low = int(position)
        matrix[i, low] += 1 - (position - low)
        matrix[i, min(low + 1, size - 1)] += position - low
    return matrix
