"""A start for ΔConvBlocks from the teacher's own answers: warm-started, and their last layers solved.

A block's answer is linear in `conv_out` and `conv_pool`, so the best values of these follow from sums over
noisy drawings: ridge regression on what the attention answers, of the change from the warm start.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deltaconv_core import DeltaConvBlock
from deltaconv_core.distill import tapped

RIDGE = 1e-2  # of the mean of the Gram matrix's diagonal
SEED, BATCHES, BATCH_SIZE = 3000, 16, 8


@torch.no_grad()
def ridge_start(teacher: Any, blocks: Mapping[str, DeltaConvBlock]) -> None:
    """Changes warm-started blocks in place.

    Args:
        teacher: a `train_student.Teacher`.
        blocks: by site.
    """
    sums: dict[str, tuple[Tensor, Tensor]] = {}

    def see(site: str, x: Tensor, grid: tuple[int, int], y: Tensor) -> None:
        block = blocks[site]
        features = features_of(block, x, grid).flatten(0, 1).double()
        rest = (y - block(x, grid=grid)).flatten(0, 1).double()
        gram, products = sums.get(site, (0.0, 0.0))
        sums[site] = gram + features.T @ features, products + features.T @ rest

    network, batches = teacher.network, teacher.batches(BATCH_SIZE, SEED)
    watching = tapped(network.attentions, blocks, network.grids)
    with watching as taps, taps.mode(mixing=False, observe=see):
        for number in range(BATCHES):
            network(batches(number))
    for site, (gram, products) in sums.items():
        added = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        change = torch.linalg.solve(gram + added, products).T.to(blocks[site].conv_out.weight.dtype)
        block, inner = blocks[site], blocks[site].conv_out.weight.shape[1]
        block.conv_out.weight += change[:, :inner].reshape(block.conv_out.weight.shape)
        block.conv_pool.weight += change[:, inner:-1].reshape(block.conv_pool.weight.shape)
        block.conv_out.bias += change[:, -1]


def features_of(block: DeltaConvBlock, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, N, F + C + 1): what `conv_out` and `conv_pool` are given at each token, and 1 for the bias.

    Read off the block itself, with layers that hand on their inputs.
    """
    layers = (block.conv_out, block.conv_pool)
    own = [(layer.weight.clone(), layer.bias.clone()) for layer in layers]
    parts = []
    for chosen in layers:
        width, inner = chosen.weight.shape[0], chosen.weight[0].numel()
        for start in range(0, inner, width):
            for layer in layers:
                layer.weight.zero_()
                layer.bias.zero_()
            some = torch.arange(start, min(start + width, inner))
            chosen.weight.view(width, inner)[some - start, some] = 1
            parts.append(block(x, grid=grid)[..., : len(some)])
    for layer, (weight, bias) in zip(layers, own, strict=True):
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return torch.cat([*parts, torch.ones_like(x[..., :1])], dim=-1)
