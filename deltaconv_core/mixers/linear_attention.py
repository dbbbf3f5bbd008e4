"""LinFusion's generalized linear attention: the second token mixer, to compare ΔConv with.

Liu et al., "LinFusion: 1 GPU, 1 Minute, 16K Image", arXiv 2409.02097; formula as in the authors' code,
Huage001/LinFusion, src/linfusion/attention.py. Per head, with phi(u) = elu(u) + 1 and tokens x_1 ... x_N:

    q_i = W_q (x_i + f_q(x_i)),  k_i = W_k (x_i + f_k(x_i)),  v_i = W_v x_i
    y_i = phi(q_i) . [mean_j phi(k_j) v_j^T] / (phi(q_i) . [mean_j phi(k_j)] + 1e-4)

and W_out with its bias on the joined heads. f is Linear, LayerNorm, LeakyReLU, Linear, all as wide as the
tokens. Both brackets are summed over the tokens once, so the cost is linear in N; no token sees a position.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..block import ops
from ..block.steps import call_layer
from ..errors import DeltaConvError

EPSILON = 1e-4  # of the denominator, as in the authors' code


class Shift(nn.Module):
    """x + f(x), with f as above. f starts at zero, as in the authors' first training script
    (src/train/distill.py, revision b3ec058): its last layer has zero weight and bias."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.last = nn.Linear(dim, dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        h = call_layer(self.first, x).float()
        h = F.layer_norm(h, norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)
        return x + call_layer(self.last, F.leaky_relu(h).to(x.dtype))


class LinearAttention(nn.Module):
    """Stands in for one self-attention, as `DeltaConvBlock` does.

    All weights are trained, the projections too, as LinFusion does (src/train/distill.py:
    `self_attn_modules.requires_grad_(True)`; AdamW, learning rate 1e-4, no weight decay).

    Args:
        dim: channels C of the tokens.
        heads: number of heads; they share `inner` channels.
        inner: channels of q, k and v; None: as many as the tokens have.
        bias: whether q, k and v have one.

    Raises:
        DeltaConvError: heads that do not divide inner.

    Example:
        >>> LinearAttention(64, heads=2)(torch.randn(2, 15 * 20, 64), grid=(15, 20)).shape
        torch.Size([2, 300, 64])
    """

    def __init__(self, dim: int, heads: int, inner: int | None = None, bias: bool = False) -> None:
        super().__init__()
        inner = dim if inner is None else inner
        if heads < 1 or inner % heads:
            raise DeltaConvError(f"expected heads that divide {inner} channels, got {heads}")
        self.dim, self.heads = dim, heads
        self.shift_q, self.shift_k = Shift(dim), Shift(dim)
        self.to_q = nn.Linear(dim, inner, bias=bias)
        self.to_k = nn.Linear(dim, inner, bias=bias)
        self.to_v = nn.Linear(dim, inner, bias=bias)
        self.to_out = nn.Linear(inner, dim)

    @classmethod
    @torch.no_grad()
    def from_attention(
        cls, to_q: nn.Linear, to_k: nn.Linear, to_v: nn.Linear, to_out: nn.Linear, heads: int
    ) -> LinearAttention:
        """LinFusion's start: the pre-trained attention's own projections, copied, and f_q = f_k = 0.

        Args:
            to_q, to_k, to_v: (inner, C) layers, all with or all without bias.
            to_out: (C, inner) layer; without a bias it gets one of zero.
            heads: of the attention.
        """
        inner, dim = to_q.weight.shape
        mixer = cls(dim, heads, inner, bias=to_q.bias is not None)
        own = (mixer.to_q, mixer.to_k, mixer.to_v, mixer.to_out)
        for target, source in zip(own, (to_q, to_k, to_v, to_out), strict=True):
            target.weight.copy_(source.weight)
            if target.bias is not None:
                target.bias.copy_(torch.zeros_like(target.bias) if source.bias is None else source.bias)
        return mixer.to(to_q.weight.device)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Mixes the tokens.

        Args:
            x: (B, H * W, C) floating point.
            grid: (H, W); only their number matters here.

        Returns:
            (B, H * W, C) in x's dtype; sums over tokens are float32.

        Raises:
            DeltaConvError: tokens that do not fit the grid or the mixer.
        """
        if x.ndim != 3 or x.shape[1:] != (grid[0] * grid[1], self.dim) or not x.is_floating_point():
            raise DeltaConvError(
                f"expected floating point tokens of shape (B, {grid[0]} x {grid[1]}, {self.dim}), "
                f"got {x.dtype} {tuple(x.shape)}"
            )
        dtype = x.dtype
        x = x.to(ops.compute_dtype(x))
        q = F.elu(self._heads(call_layer(self.to_q, self.shift_q(x)))) + 1
        k = F.elu(self._heads(call_layer(self.to_k, self.shift_k(x)))) + 1
        v = self._heads(call_layer(self.to_v, x))
        values = (k / x.shape[1]).transpose(2, 3) @ v  # (B, heads, d, d)
        scale = q @ k.mean(dim=2).unsqueeze(3) + EPSILON  # (B, heads, N, 1)
        y = (q @ values / scale).transpose(1, 2).flatten(2)
        return call_layer(self.to_out, y.to(x.dtype)).to(dtype)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, inner) -> (B, heads, N, d) in float32."""
        return x.float().reshape(*x.shape[:2], self.heads, x.shape[2] // self.heads).transpose(1, 2)
