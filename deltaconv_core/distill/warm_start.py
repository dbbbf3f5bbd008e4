"""A start for distillation that already is the teacher under uniform attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..block import DeltaConvBlock


@torch.no_grad()
def warm_start(
    block: DeltaConvBlock,
    value: Tensor,
    out: Tensor,
    out_bias: Tensor | None,
    value_bias: Tensor | None = None,
) -> None:
    """Sets a fresh block to what the attention computes when every token attends to all others alike.

    Uniform attention averages the values, so its output is W_out (W_v mean(x) + b_v) + b_out: a linear map
    of the spatial mean, which is what `conv_pool` is. The convolutions' output starts at zero; they learn
    the rest.

    Args:
        block: of C channels, changed in place.
        value: W_v, (D, C).
        out: W_out, (C, D).
        out_bias, value_bias: b_out (C,) and b_v (D,), where the attention has them.
    """
    bias = torch.zeros(len(out)) if out_bias is None else out_bias.float()
    if value_bias is not None:
        bias = bias + out.float() @ value_bias.float()
    block.conv_pool.weight.copy_(out.float() @ value.float())
    block.conv_pool.bias.copy_(bias)
    nn.init.zeros_(block.conv_out.weight)
    nn.init.zeros_(block.conv_out.bias)
