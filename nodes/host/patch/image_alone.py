"""A ΔConvBlock in place of SD 3.5's second attentions, which the image's tokens have among themselves.

Their block does not call them: it takes queries, keys and values from one of their methods and hands the
answer to another. So for the time of a call of that block, two callables stand in for these methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def standing_in(
    attention: Any, block: Callable[..., Tensor], grid: tuple[int, int], choice: Any
) -> Iterator[None]:
    """Inside, the block answers in place of the attention.

    Args:
        attention: SelfAttention of ComfyUI's MMDiT, of the image alone.
        block: (x (B, N, C), grid) -> (B, N, C).
        grid: (H, W) of the image's tokens.
        choice: True, or for each sample (B,) whether the block runs; the others get the attention's answer.
    """
    seen: list[Tensor] = []
    before, after = attention.pre_attention, attention.post_attention

    def pre_attention(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(x)
        first = x[:, :1]  # an attention of one token costs next to nothing
        return (first, first, first) if choice is True else before(x)

    def post_attention(answer: Tensor) -> Tensor:
        mixed = block(seen.pop(), grid=grid)
        if choice is True:
            return mixed
        chosen = torch.as_tensor(choice, device=mixed.device).view(-1, 1, 1)
        return torch.where(chosen, mixed, after(answer))

    try:
        attention.pre_attention, attention.post_attention = pre_attention, post_attention
        yield
    finally:
        del attention.pre_attention, attention.post_attention  # the class's are there again
