"""BlockSpec refuses nonsense when it is built, and counts what it describes."""

from __future__ import annotations

import json

import pytest

from deltaconv_core import BlockSpec, DeltaConvBlock, DeltaConvError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dim": 0}, "dim .* 1 to 65536, got 0"),
        ({"dim": 16.0}, r"dim .* got 16\.0"),
        ({"dim": 10**9}, "dim .* got 1000000000"),
        ({"dim": True}, "dim .* got True"),
        ({"dim": 6}, "even .* got 3 from dim=6, ratio=0.5"),
        ({"dim": 2}, "at least 2, got 1"),
        ({"kernel_size": 4}, "odd kernel_size .* got 4"),
        ({"kernel_size": -3}, "kernel_size .* got -3"),
        ({"scales": ()}, r"1 to 8 numbers, got \(\)"),
        ({"scales": 0.5}, "numbers, got 0.5"),
        ({"scales": (1.0, 0.0)}, "0 < scale <= 1"),
        ({"scales": (2.0,)}, "0 < scale <= 1"),
        ({"scales": (float("nan"),)}, "0 < scale <= 1"),
        ({"scales": ("1",)}, "0 < scale <= 1"),
        ({"scales": (0.5,) * 9}, "1 to 8"),
        ({"gate": "relu"}, "gate to be one of simple, sigmoid, scaled, got 'relu'"),
        ({"gate": ["simple"]}, "gate to be one of"),
        ({"merge": "mean"}, "merge to be one of concat, sum, got 'mean'"),
        ({"pooling": None}, "pooling to be one of average, bilinear, got None"),
        ({"depthwise_bias": 1}, "depthwise_bias .* got 1"),
        ({"context": "yes"}, "context .* got 'yes'"),
        ({"ratio": 0}, "ratio"),
        ({"ratio": float("inf")}, "ratio"),
    ],
)
def test_refuses(values, message):
    with pytest.raises(DeltaConvError, match=message):
        BlockSpec(**{"dim": 16, "kernel_size": 3, **values})


def test_is_frozen_and_normal():
    spec = BlockSpec(16, 3, scales=[1, 0.5])
    assert spec.scales == (1.0, 0.5) and spec == BlockSpec(16, 3) and hash(spec) == hash(BlockSpec(16, 3))
    with pytest.raises(AttributeError):
        spec.dim = 8


@pytest.mark.parametrize(
    "spec",
    [
        BlockSpec(16, 3),
        BlockSpec(20, 5, scales=(1.0, 0.5, 1 / 3), gate="scaled", merge="sum", ratio=0.3),
        BlockSpec(8, 7, gate="sigmoid", pooling="bilinear", depthwise_bias=True),
        BlockSpec(8, 7, context=True),
        BlockSpec.lean(64, 9),
    ],
)
def test_describes_its_block(spec):
    assert BlockSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    block = DeltaConvBlock(spec, device="meta")
    assert spec.num_parameters == sum(p.numel() for p in block.parameters())
    assert (block.conv_up.out_features, block.conv_out.in_features) == (spec.inter, spec.merged)


@pytest.mark.parametrize("values", [{"dim": 16}, {"dim": 16, "kernel_size": 3, "heads": 8}, {}])
def test_refuses_a_dictionary_with_other_fields(values):
    with pytest.raises(DeltaConvError, match="unknown .* missing"):
        BlockSpec.from_dict(values)
