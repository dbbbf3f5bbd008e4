"""A small frozen network with two self-attentions, as a host would bring it to distillation."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from deltaconv_core import BlockSpec, DeltaConvBlock
from deltaconv_core.distill import Batch, Settings, distill, warm_start

GRID = (5, 7)
SETTINGS = Settings(
    layer_steps=4, output_steps=4, learning_rate=1e-2, warmup=2, accumulation=2, ema=0.9, save_every=3
)


class Attention(nn.Module):
    def __init__(self, dim, heads=2):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x, options=None):
        q, k, v = (
            f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v)
        )
        return self.to_out(F.scaled_dot_product_attention(3 * q, 3 * k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(dim), Attention(dim)
        self.norm2, self.ff = nn.LayerNorm(dim), nn.Linear(dim, dim)

    def forward(self, x, options):
        grid = options["grid"]
        options["grid"] = None  # what comes later must not see it
        x = x + self.attn1(self.norm1(x), options={"grid": grid})
        return x + torch.tanh(self.ff(self.norm2(x)))


class TinyNetwork(nn.Module):
    """4 channels, 8 inside; a call is a `Network`'s."""

    prediction = "epsilon"

    def __init__(self):
        super().__init__()
        self.enter, self.layers, self.leave = (
            nn.Linear(4, 8),
            nn.ModuleList([Layer(8), Layer(8)]),
            nn.Linear(8, 4),
        )
        self.requires_grad_(False).eval()
        self.calls = 0

    def forward(self, batch):
        self.calls += 1
        x = self.enter(batch.noisy)
        for layer in self.layers:
            x = layer(x, options={"grid": GRID})
        return self.leave(x)

    @property
    def attentions(self):
        return {f"layers.{i}.attn1": layer.attn1 for i, layer in enumerate(self.layers)}

    @property
    def grids(self):
        return {site: lambda x, call: call["options"]["grid"] for site in self.attentions}

    @property
    def streams(self):
        return {f"layers.{i}.attn1": layer.norm2 for i, layer in enumerate(self.layers)}

    @property
    def segments(self):
        return list(self.layers)


def make_network():
    torch.manual_seed(0)
    return TinyNetwork()


def make_mixers(network, seed=1):
    torch.manual_seed(seed)
    mixers = {site: DeltaConvBlock(BlockSpec(8, 3)) for site in network.attentions}
    for site, mixer in mixers.items():
        warm_start(mixer, network.attentions[site])
    return mixers


def batches(number):
    """The batch of a number, always the same."""
    generator = torch.Generator().manual_seed(number)
    noisy, target = torch.randn(2, 2, GRID[0] * GRID[1], 4, generator=generator)
    return Batch(noisy, target, torch.tensor([0.5, 20.0]))


def trained(settings=SETTINGS, folder=None, on_step=None, data=batches):
    """(mixers, result) of a run from the start, or from what the folder has."""
    network = make_network()
    mixers = make_mixers(network)
    return mixers, distill(network, mixers, data, settings, folder, on_step)
