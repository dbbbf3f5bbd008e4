"""What a block starts distillation from."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..block import DeltaConvBlock
from ..errors import DeltaConvError


@torch.no_grad()
def warm_start(block: DeltaConvBlock, attention: Callable[[Tensor], Tensor]) -> None:
    """Sets a fresh block to what the attention computes when every token attends to all others alike.

    Uniform attention averages the values, so its output is W_out (W_v mean(x) + b_v) + b_out: a linear map
    of the spatial mean, which is what `conv_pool` is. The convolutions' output starts at zero, so that the
    block is nothing else at first; they learn the rest.

    What the convolutions are given to learn from is made ready too: the directions in which that map is
    strongest, smoothed over a pixel to a third of the kernel, behind gates that are half open.

    The map is read off the attention itself: a token that is alone attends to itself only, whatever the
    queries and keys. So any host's attention will do, with any projections, LoRA and weight dtype.

    Args:
        block: of C channels, changed in place.
        attention: (B, 1, C) in the block's dtype and on its device -> (B, 1, C). Where it rounds to fewer
            bits, so is the map: it is a difference of two answers.

    Raises:
        DeltaConvError: the attention gives NaN or infinity.
    """
    weight = block.conv_pool.weight
    tokens = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    bias = attention(torch.zeros_like(tokens[:1, None]))[0, 0]
    weight.copy_((attention(tokens[:, None])[:, 0] - bias).T)
    block.conv_pool.bias.copy_(bias)
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise DeltaConvError(
            f"an attention of {len(weight)} channels gives NaN or infinite values for a single token; its "
            "weights are damaged, or too large for the dtype it computes in: try precision bf16 or fp32"
        )
    nn.init.zeros_(block.conv_out.weight)
    nn.init.zeros_(block.conv_out.bias)
    _ready(block)


def _ready(block: DeltaConvBlock) -> None:
    """The first half of the inner channels holds values, the second, random so far, their gates."""
    spec, up = block.spec, block.conv_up
    half = spec.inter // 2
    strongest = torch.linalg.svd(block.conv_pool.weight.float()).Vh[:half]
    up.weight[: len(strongest)] = strongest.to(up.weight.dtype)
    nn.init.zeros_(up.bias)
    opening = {"simple": 1 / math.sqrt(half), "sigmoid": 1.0, "scaled": math.sqrt(spec.inter)}[spec.gate]
    up.weight[half:] *= opening / 2
    up.bias[half:] = opening
    for stage in block.stages():
        kernels = stage.conv_spatial.weight
        kernels.copy_(_gaussians(spec.inter, spec.kernel_size).to(kernels))
        if stage.conv_spatial.bias is not None:
            nn.init.zeros_(stage.conv_spatial.bias)


def _gaussians(count: int, size: int) -> Tensor:
    """(count, 1, size, size) kernels that sum to 1, from narrow to wide, all widths among any few of them."""
    order = (torch.arange(count) * 0.618034 % 1).argsort().argsort()
    widths = torch.logspace(math.log10(0.5), math.log10(max(0.5, size / 3)), count)[order]
    offsets = torch.arange(size) - size // 2
    lines = torch.exp(-(offsets**2) / (2 * widths[:, None] ** 2))
    lines = lines / lines.sum(dim=1, keepdim=True)
    return (lines[:, :, None] * lines[:, None, :])[:, None]


@torch.no_grad()
def random_start(block: DeltaConvBlock) -> None:
    """PyTorch's own initialization of every layer, as the authors' code starts its blocks."""
    for module in block.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            bound = 1 / math.sqrt(module.weight[0].numel())
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.uniform_(module.bias, -bound, bound)
