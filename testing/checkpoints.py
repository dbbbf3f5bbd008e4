"""A small checkpoint, and whether two are the same to the last bit."""

from __future__ import annotations

import torch

from deltaconv_core import BlockSpec, Checkpoint, DeltaConvBlock

SITE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
OTHER = "mid_block.attentions.0.transformer_blocks.0.attn1"
BASE = "down_blocks.0.resnets.0.conv1.weight"


def small_checkpoint(seed=0):
    torch.manual_seed(seed)
    return Checkpoint(
        architecture="unet-8x1-12x1",
        blocks={
            SITE: DeltaConvBlock(BlockSpec(8, 3), dtype=torch.float16),
            OTHER: DeltaConvBlock(BlockSpec(12, 5, (1.0, 1 / 3), "sigmoid", "sum", "bilinear", True, 1.0)),
        },
        base_weights={BASE: torch.randn(4, 3, 3, 3, dtype=torch.bfloat16)},
        metadata={"teacher": "a model", "steps": "10", "note": 'ΔConv\n"quoted"'},
    )


def assert_same(a, b):
    assert (a.architecture, a.metadata) == (b.architecture, b.metadata)
    assert {s: block.spec for s, block in a.blocks.items()} == {
        s: block.spec for s, block in b.blocks.items()
    }
    pairs = [(a.base_weights, b.base_weights)]
    pairs += [(a.blocks[site].state_dict(), b.blocks[site].state_dict()) for site in a.blocks]
    for left, right in pairs:
        assert left.keys() == right.keys()
        for name in left:
            assert left[name].dtype == right[name].dtype and left[name].shape == right[name].shape
            assert torch.equal(
                left[name].contiguous().view(torch.uint8), right[name].contiguous().view(torch.uint8)
            )
