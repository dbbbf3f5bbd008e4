"""Attention maps of some queries, from q and k."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_maps(q: Tensor, k: Tensor, image: slice, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Where some queries look, among the tokens of the image.

    In joint attention the keys also hold text (or other pictures). The map is the attention's own, cut down
    to the image and normalized there, which is the softmax over the image's keys alone.

    Args:
        q: (B, heads, Q, d), any floating dtype.
        k: (B, heads, M, d) all keys.
        image: where the N tokens of the image are among the keys.
        mask: added to the logits, or bool (False: not seen); broadcasts to (B, heads, Q, M).

    Returns:
        (B, heads, Q, N) float32, which sums to 1 over N; and (B, heads, Q) float32, the share of the whole
        attention that goes to other keys.
    """
    logits = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-1, -2)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.float()
    inside = logits[..., image]
    maps = inside.softmax(dim=-1)
    if inside.shape[-1] == logits.shape[-1]:
        return maps, torch.zeros_like(maps[..., 0])
    outside = -torch.expm1(inside.logsumexp(dim=-1) - logits.logsumexp(dim=-1))
    return maps, outside.clamp(min=0)
