"""Recommendations from locality, their text, and the cost that they predict."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from deltaconv_core import BlockSpec, DeltaConvBlock, DeltaConvError
from deltaconv_core.block.flops import attention_flops, block_flops
from deltaconv_core.block.ops import fastest
from deltaconv_core.locality import Recommendation, recommend
from testing.attention_maps import locality, uniform


def layer(erf, without_sinks=None, site="mid_block.attn1"):
    """A layer of 32 x 32 tokens with these receptive fields."""

    def curve(field):
        return torch.where(torch.arange(32) >= field // 2, 0.9, 0.1).double()

    without_sinks = erf if without_sinks is None else without_sinks
    some = locality((4, 4), uniform((4, 4)))
    return replace(some, site=site, high=curve(erf), high_without_sinks=curve(without_sinks))


@pytest.mark.parametrize(
    ("erf", "limit", "k"),
    [(1, 13, 3), (5, 13, 3), (7, 13, 5), (9, 13, 5), (11, 13, 7), (25, 13, 13), (27, 13, None)]
    + [(17, 7, None), (13, 7, 7), (5, 3, 3)],
)
def test_the_half_scale_stage_covers_the_receptive_field(erf, limit, k):
    advice = recommend([layer(erf)], "sd15", max_kernel_size=limit)
    assert advice.kernel_sizes == ({"mid_block.attn1": k} if k else {})
    assert advice.skip == (() if k else ("mid_block.attn1",))


def test_one_scale_reaches_half_as_far():
    assert recommend([layer(9)], "sd15", scales=(1.0,)).kernel_sizes == {"mid_block.attn1": 9}


def test_sinks_do_not_widen_the_kernel():
    assert recommend([layer(63, without_sinks=5)], "sd15").kernel_sizes == {"mid_block.attn1": 3}


@pytest.mark.parametrize("limit", [4, 0, -3])
def test_impossible_limits_are_refused(limit):
    with pytest.raises(DeltaConvError, match="kernel_size"):
        recommend([layer(5)], "sd15", max_kernel_size=limit)


def test_the_text_reads_back():
    advice = recommend([layer(5, site="a"), layer(63, site="b"), layer(11, site="c")], "sdxl")
    assert json.loads(advice.to_json()) == {
        "kind": "deltaconv-recommendation",
        "version": 1,
        "architecture": "sdxl",
        "kernel_sizes": {"a": 3, "c": 7},
        "skip": ["b"],
    }
    assert Recommendation.from_json(advice.to_json()) == advice


GOOD = json.loads(Recommendation("sd15", {"a": 3}, ("b",)).to_json())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a plain text", "as JSON, got 'a plain text'"),
        ("[]", "got \\[\\]"),
        (json.dumps(GOOD | {"kind": "else"}), "of the kind 'deltaconv-recommendation'"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "skip"}), "'skip'"),
        (json.dumps(GOOD | {"version": 2}), "version 2, known is 1"),
        (json.dumps(GOOD | {"kernel_sizes": [3]}), "kernel_sizes to be an object"),
        (json.dumps(GOOD | {"kernel_sizes": {"a": 4}}), "a: expected an odd kernel_size.* got 4"),
        (json.dumps(GOOD | {"kernel_sizes": {"a": "3"}}), "a: expected kernel_size to be a whole number"),
        (json.dumps(GOOD | {"skip": [1]}), "skip a list of sites"),
        (json.dumps(GOOD | {"skip": ["a"]}), "a: both in kernel_sizes and in skip"),
        (json.dumps(GOOD | {"architecture": 1}), "architecture"),
    ],
)
def test_other_texts_are_refused(text, message):
    with pytest.raises(DeltaConvError, match=message):
        Recommendation.from_json(text)


# ---- cost ----


def counted(run):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("grid", [(8, 8), (7, 10)])
@pytest.mark.parametrize(
    "spec", [BlockSpec(16, 5), BlockSpec(24, 3, (1.0, 0.5, 1 / 3), merge="sum")], ids=str
)
@pytest.mark.parametrize("form", ["literal", "early"])
def test_block_flops_are_those_that_torch_counts(grid, spec, form):
    block = DeltaConvBlock(spec, device="meta")
    x = torch.empty(1, grid[0] * grid[1], spec.dim, device="meta")
    with fastest.fixed(projection=form):
        assert block_flops(spec, grid, early=form == "early") == counted(lambda: block(x, grid))


def test_attention_flops_are_those_that_torch_counts():
    n, c = 20, 16
    x, w = torch.empty(1, 1, n, c, device="meta"), torch.empty(c, c, device="meta")

    def attention():
        q, k, v = x @ w, x @ w, x @ w
        return torch.nn.functional.scaled_dot_product_attention(q, k, v) @ w

    assert attention_flops(n, c) == counted(attention)


@pytest.mark.parametrize(("side", "gigaflops"), [(64, 3.62), (128, 14.5)])
def test_block_flops_at_the_papers_layer(side, gigaflops):
    assert block_flops(BlockSpec(640, 9), (side, side)) / 1e9 == pytest.approx(gigaflops, rel=0.005)


def test_block_flops_of_each_projection_at_the_papers_layer():
    c, k, n = 640, 9, 64 * 64
    assert block_flops(BlockSpec(c, k), (64, 64)) == 2 * n * c**2 + 1.25 * n * c * k**2 + 2 * c**2
    assert block_flops(BlockSpec(c, k), (64, 64), early=True) / n == pytest.approx(730e3, rel=0.002)


def test_the_block_counts_as_early_where_autograd_is_off():
    block = DeltaConvBlock(BlockSpec(640, 9), device="meta")
    x = torch.empty(1, 64 * 64, 640, device="meta")
    assert counted(lambda: block(x, (64, 64))) == block_flops(block.spec, (64, 64), early=True)
