"""The projections of a diffusers attention, called, so that LoRA and quantized or hooked layers act."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..errors import DeltaConvError


def queries_keys_values(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, heads, N, d) of tokens (B, N, C), as `AttnProcessor2_0` makes them."""
    if getattr(attention, "fused_projections", False):
        parts = attention.to_qkv(x).chunk(3, dim=2)
    else:
        parts = (attention.to_q(x), attention.to_k(x), attention.to_v(x))
    q, k, v = (part.reshape(*part.shape[:2], attention.heads, -1).transpose(1, 2) for part in parts)
    q = q if attention.norm_q is None else attention.norm_q(q)
    k = k if attention.norm_k is None else attention.norm_k(k)
    return q, k, v


def mixed(attention: Any, x: Tensor, mixer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """(B, N, C) -> (B, N, C): the attention with a mixer of its queries, keys and values in it."""
    y: Tensor = mixer(*queries_keys_values(attention, x)).transpose(1, 2).flatten(2)
    for layer in attention.to_out:
        y = layer(y)
    return y


def check_plain(site: str, attention: Any) -> None:
    """Refuses an attention that does more than project, attend and project.

    Raises:
        DeltaConvError: with what it does.
    """
    more = [name for name in ("group_norm", "spatial_norm") if getattr(attention, name, None) is not None]
    if getattr(attention, "residual_connection", False):
        more.append("residual_connection")
    if getattr(attention, "rescale_output_factor", 1) != 1:
        more.append("rescale_output_factor")
    if more:
        raise DeltaConvError(
            f"the self-attention {site} has {', '.join(more)}, which a hybrid mixer between its projections "
            "would leave out; leave this site out with `blocks`"
        )
