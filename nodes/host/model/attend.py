"""Reaching q, k and v of a self-attention on their way into the attention itself, behind its own projections.

Most of ComfyUI's models hand `transformer_options` down to the attention, which asks there for an override.
PixArt hands nothing down; the few lines around its attention are done here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from comfy.ldm.pixart.blocks import AttentionKVCompress
from comfy.model_patcher import ModelPatcher

from ....deltaconv_core.errors import DeltaConvError
from .sites import Site
from .standing import Forward

OVERRIDE = "optimized_attention_override"

# (q, k, v, mask), the first three (B, heads, N, d). Returns (B, heads, N, d); None: attention as usual.
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor | None]

# The attention as it would run: (q, k, v, mask) -> answers, all by head.
Usual = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
AttendWithUsual = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, Usual], torch.Tensor | None
]


def intercepted(forward: Forward, attend: Attend) -> Forward:
    """The forward with `attend` in it.

    Args:
        forward: of an attention module, or of a block that hands `transformer_options` to its attention;
            bound to the module.
        attend: called for every attention inside.
    """
    module = getattr(forward, "__self__", None)
    if isinstance(module, AttentionKVCompress):
        return _pixart(module, forward, attend)

    return with_usual(forward, lambda q, k, v, mask, _: attend(q, k, v, mask))


def with_usual(forward: Forward, attend: AttendWithUsual) -> Forward:
    """The same for `attend` that may also call the attention that would run without it."""

    def run(*args: Any, **call: Any) -> Any:
        options = call.get("transformer_options") or {}
        override = _override(attend, options.get(OVERRIDE))
        return forward(*args, **call | {"transformer_options": options | {OVERRIDE: override}})

    return run


def _override(attend: AttendWithUsual, before: Forward | None) -> Forward:
    """What ComfyUI calls in place of its attention; `before` is the override that was there."""

    def override(
        attention: Forward,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        mask: torch.Tensor | None = None,
        **more: Any,
    ) -> torch.Tensor:
        usual = attention if before is None else partial(before, attention)
        split, joined = more.get("skip_reshape", False), not more.get("skip_output_reshape", False)

        def by_head(t: torch.Tensor, already: bool) -> torch.Tensor:
            # SD 3's values come divided by head already, in a layout of their own.
            return t if already else t.reshape(*t.shape[:2], heads, -1).transpose(1, 2)

        def call_usual(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
        ) -> torch.Tensor:
            """In the layout of the call that was met, which whatever answers it is known to take."""
            q, k, v = (t if split else t.transpose(1, 2).flatten(2) for t in (q, k, v))
            return by_head(usual(q, k, v, heads, mask=mask, **more), not joined)

        parts = [by_head(t, split) for t in (q, k, v)]
        out = attend(parts[0], parts[1], parts[2], _four_dimensional(mask), call_usual)
        if out is None:
            return usual(q, k, v, heads, mask=mask, **more)
        return out.transpose(1, 2).flatten(2) if joined else out

    return override


def _four_dimensional(mask: torch.Tensor | None) -> torch.Tensor | None:
    """ComfyUI's masks may lack the batch, or the heads."""
    if mask is None or mask.ndim == 4:
        return mask
    return mask[None, None] if mask.ndim == 2 else mask[:, None]


def _pixart(module: AttentionKVCompress, forward: Forward, attend: Attend) -> Forward:
    """The forward of PixArt's attention, done by `attend`."""
    if module.sr_ratio > 1:
        raise DeltaConvError(
            f"this PixArt shrinks the keys of its self-attention ({module.sr_ratio} x); only attention whose "
            "keys are the tokens themselves can be looked at or replaced here"
        )

    def run(x: torch.Tensor, *args: Any, **call: Any) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q, k, v = module.qkv(x).unflatten(2, (3, -1)).unbind(2)
        q, k, v = (
            t.reshape(batch, tokens, module.num_heads, -1).transpose(1, 2)
            for t in (module.q_norm(q), module.k_norm(k), v)
        )
        out = attend(q, k, v, None)
        return forward(x, *args, **call) if out is None else module.proj(out.transpose(1, 2).flatten(2))

    return run


def heads_of(model: ModelPatcher, site: Site) -> int:
    """Heads of the attention at a site of a ModelPatcher."""
    attention = model.get_model_object(site.path)
    return attention.num_heads if isinstance(attention, AttentionKVCompress) else attention.heads
