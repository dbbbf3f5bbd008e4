"""The self-attention layers of a known model, and what they cost with attention and with ΔConv."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..block import DeltaConvBlock
from ..block.spec import BlockSpec
from ..errors import DeltaConvError
from ..sites import ARCHITECTURES, UNet, authors_specs, known_heads, level_of, part_of
from .counting import count_flops
from .timing import alternate

ATTENTION, DELTACONV = "attention", "ΔConv"


class SelfAttention(nn.Module):
    """Plain self-attention with its projections, as U-Nets have it; PyTorch chooses how it is computed.

    Args:
        dim: channels C of the tokens.
        heads: that share them.
        device, dtype: of the weights.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (
            nn.Linear(dim, dim, bias=False, device=device, dtype=dtype) for _ in range(3)
        )
        self.to_out = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, H * W, C) -> (B, H * W, C)."""
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        y: Tensor = self.to_out(self.attend(q, k, v, grid).transpose(1, 2).flatten(2))
        return y

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """The attention itself: (B, heads, N, d) each -> (B, heads, N, d)."""
        return F.scaled_dot_product_attention(q, k, v)


@dataclass(frozen=True)
class Layer:
    """Equal self-attentions of one part.

    Args:
        part: of the network, such as "down_blocks.1".
        spec: the block that can stand in for each.
        heads: of each.
        grid: (H, W) of the tokens.
        sites: how many there are.
    """

    part: str
    spec: BlockSpec
    heads: int
    grid: tuple[int, int]
    sites: int = 1


@dataclass(frozen=True)
class LayerCost:
    """What equal self-attentions of one part cost together.

    Args:
        part, sites, grid: as in `Layer`.
        channels, kernel_size: of the blocks.
        attention_seconds, block_seconds: one forward pass of all sites.
        attention_flops, block_flops: likewise, two for each multiply-add.
    """

    part: str
    sites: int
    grid: tuple[int, int]
    channels: int
    kernel_size: int
    attention_seconds: float
    block_seconds: float
    attention_flops: int
    block_flops: int


def layers_of(
    architecture: str, latent: tuple[int, int], specs: Mapping[str, BlockSpec] | None = None
) -> list[Layer]:
    """The layers of a known architecture in the order of the network.

    Args:
        architecture: its name.
        latent: (rows, columns).
        specs: site id -> block, of those sites that count; None: the authors'.

    Raises:
        DeltaConvError: an unknown architecture.
    """
    if architecture not in ARCHITECTURES:
        raise DeltaConvError(
            f"the shape of {architecture!r} is not known here; known are {', '.join(ARCHITECTURES)}. In "
            "ComfyUI, the node ΔConv Benchmark measures any model that ΔConv works on"
        )
    shape = ARCHITECTURES[architecture]
    levels = len(shape.down) if isinstance(shape, UNet) else 0
    found: Counter[Layer] = Counter()
    for site, spec in (authors_specs(architecture) if specs is None else specs).items():
        height, width = (-(-side >> level_of(site, levels)) for side in latent)
        found[Layer(part_of(site), spec, known_heads(architecture, spec.dim), (height, width))] += 1
    return [replace(layer, sites=count) for layer, count in found.items()]


def measure_layers(
    layers: Iterable[Layer],
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    check: Callable[[], object] = lambda: None,
) -> Iterator[LayerCost]:
    """Times attention and ΔConv by turns on random tokens; equal layers of different parts once.

    Args:
        layers: what to measure.
        batch: samples in the forward pass.
        device, dtype: to compute on and in.
        repeats: of each; the median counts.
        check: called before each run; raises to stop.
    """
    known: dict[Layer, LayerCost] = {}
    for layer in layers:
        one = replace(layer, part="", sites=1)
        if one not in known:
            known[one] = _measure(one, batch, device, dtype, repeats, check)
        cost = known[one]
        yield replace(
            cost,
            part=layer.part,
            sites=layer.sites,
            attention_seconds=cost.attention_seconds * layer.sites,
            block_seconds=cost.block_seconds * layer.sites,
            attention_flops=cost.attention_flops * layer.sites,
            block_flops=cost.block_flops * layer.sites,
        )


def _measure(
    layer: Layer,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    check: Callable[[], object],
) -> LayerCost:
    with torch.inference_mode():
        times = alternate(_both(layer, batch, device, dtype), device, repeats, check)
    seconds = {name: statistics.median(taken) for name, taken in times.items()}
    return layer_cost(layer, batch, seconds[ATTENTION], seconds[DELTACONV])


def layer_cost(layer: Layer, batch: int, attention_seconds: float, block_seconds: float) -> LayerCost:
    """What equal layers cost together: the seconds that all of them take, and operations, counted here."""
    counted = _both(layer, batch, torch.device("meta"), torch.float32)
    with torch.inference_mode():
        flops = {name: layer.sites * count_flops(run) for name, run in counted.items()}
    return LayerCost(
        layer.part,
        layer.sites,
        layer.grid,
        layer.spec.dim,
        layer.spec.kernel_size,
        attention_seconds,
        block_seconds,
        flops[ATTENTION],
        flops[DELTACONV],
    )


def _both(
    layer: Layer, batch: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], Tensor]]:
    spec, grid = layer.spec, layer.grid
    attention = SelfAttention(spec.dim, layer.heads, device, dtype)
    block = DeltaConvBlock(spec, device, dtype)
    x = torch.randn(batch, grid[0] * grid[1], spec.dim, device=device).to(dtype)
    return {ATTENTION: lambda: attention(x, grid), DELTACONV: lambda: block(x, grid)}
