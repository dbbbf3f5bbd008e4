"""What a block starts distillation from."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..block import DeltaConvBlock


@torch.no_grad()
def warm_start(block: DeltaConvBlock, attention: Callable[[Tensor], Tensor]) -> None:
    """Sets a fresh block to what the attention computes when every token attends to all others alike.

    Uniform attention averages the values, so its output is W_out (W_v mean(x) + b_v) + b_out: a linear map
    of the spatial mean, which is what `conv_pool` is. The convolutions' output starts at zero, so that the
    block is nothing else at first; they learn the rest.

    The map is read off the attention itself: a token that is alone attends to itself only, whatever the
    queries and keys. So any host's attention will do, with any projections, LoRA and weight dtype.

    Args:
        block: of C channels, changed in place.
        attention: (B, 1, C) in the block's dtype and on its device -> (B, 1, C).
    """
    weight = block.conv_pool.weight
    tokens = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    bias = attention(torch.zeros_like(tokens[:1, None]))[0, 0]
    weight.copy_((attention(tokens[:, None])[:, 0] - bias).T)
    block.conv_pool.bias.copy_(bias)
    nn.init.zeros_(block.conv_out.weight)
    nn.init.zeros_(block.conv_out.bias)


@torch.no_grad()
def random_start(block: DeltaConvBlock) -> None:
    """PyTorch's own initialization of every layer, as the authors' code starts its blocks."""
    for module in block.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            bound = 1 / math.sqrt(module.weight[0].numel())
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.uniform_(module.bias, -bound, bound)
