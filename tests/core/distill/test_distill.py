"""The distillation losses by hand, the warm start against attention itself, and taps that leave no trace."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deltaconv_core import BlockSpec, DeltaConvBlock
from deltaconv_core.distill import min_snr_weight, output_losses, random_start, tapped, warm_start
from deltaconv_core.distill.losses import mean_square, total
from deltaconv_core.errors import DeltaConvError


@pytest.mark.parametrize(
    ("prediction", "snr", "weight"),
    [
        ("epsilon", 0.5, 1.0),
        ("epsilon", 5.0, 1.0),
        ("epsilon", 20.0, 0.25),
        ("v", 0.5, 1 / 3),
        ("v", 20.0, 5 / 21),
    ],
)
def test_min_snr_weight(prediction, snr, weight):
    torch.testing.assert_close(min_snr_weight(torch.tensor([snr]), prediction), torch.tensor([weight]))


def test_min_snr_refuses_other_predictions():
    with pytest.raises(DeltaConvError, match="'flow'"):
        min_snr_weight(torch.ones(1), "flow")


def test_output_losses_by_hand():
    student = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    teacher = torch.tensor([[1.0, 4.0], [3.0, 3.0]])
    target = torch.tensor([[0.0, 2.0], [0.0, 2.0]])
    losses = output_losses(student.half(), teacher, target, torch.tensor([1.0, 0.5]))
    assert losses["teacher"].item() == pytest.approx((1.0 * 2.0 + 0.5 * 9.0) / 2)
    assert losses["noise"].item() == pytest.approx((1.0 * 0.5 + 0.5 * 2.0) / 2)
    assert losses["teacher"].dtype == torch.float32


@pytest.mark.parametrize("snr", [0.01, 0.7, 5.0, 300.0])
def test_min_snr_weighs_the_same_error_alike_as_noise_and_as_v(snr):
    """An error d of the clean picture is d * sqrt(SNR) of the noise and d * sqrt(SNR + 1) of v."""
    snr = torch.tensor([snr])
    noise, v = min_snr_weight(snr) * snr, min_snr_weight(snr, "v") * (snr + 1)
    torch.testing.assert_close(noise, v)


def test_feature_terms_by_hand():
    first = mean_square(torch.zeros(2, 3), torch.full((2, 3), 2.0))
    second = mean_square(torch.ones(5, 4).half(), torch.zeros(5, 4))
    assert total([first, second]).item() == pytest.approx(4.0 + 1.0)


@pytest.mark.parametrize("biased", [False, True])
def test_warm_start_is_uniform_attention(biased):
    torch.manual_seed(0)
    dim, heads, grid = 16, 2, (3, 5)
    to_q, to_k = nn.Linear(dim, dim), nn.Linear(dim, dim)
    to_v, to_out = nn.Linear(dim, dim, bias=biased), nn.Linear(dim, dim)
    nn.init.zeros_(to_q.weight)  # equal scores: every token attends to all others alike
    nn.init.zeros_(to_q.bias)

    def attend(x):
        q, k, v = (layer(x).unflatten(2, (heads, -1)).transpose(1, 2) for layer in (to_q, to_k, to_v))
        return to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    x = torch.randn(2, math.prod(grid), dim)
    block = DeltaConvBlock(BlockSpec(dim, 3))
    warm_start(block, attend)
    torch.testing.assert_close(block(x, grid=grid), attend(x))
    expected = to_out.weight @ to_v.weight
    torch.testing.assert_close(block.conv_pool.weight, expected)
    nn.init.normal_(to_q.weight, std=3.0)  # what the queries are does not matter to the start
    warm_start(block, attend)
    torch.testing.assert_close(block.conv_pool.weight, expected)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_warm_start_from_an_attention_out_of_range(value):
    with pytest.raises(DeltaConvError, match="16 channels gives NaN or infinite values.*fp32"):
        warm_start(DeltaConvBlock(BlockSpec(16, 5)), lambda tokens: tokens * value)


@pytest.mark.parametrize("gate", ["simple", "sigmoid", "scaled"])
@pytest.mark.parametrize(("ratio", "bias"), [(0.5, False), (3.0, True)])
def test_warm_start_readies_the_convolutions(gate, ratio, bias):
    torch.manual_seed(0)
    attend = nn.Linear(16, 16)
    block = DeltaConvBlock(BlockSpec(16, 5, gate=gate, ratio=ratio, depthwise_bias=bias))
    warm_start(block, attend)
    strong = block.conv_up.weight[: min(16, block.spec.inter // 2)].detach()
    torch.testing.assert_close(strong @ strong.T, torch.eye(len(strong)), atol=1e-5, rtol=0)
    kept = (attend.weight @ strong.T).square().sum() / attend.weight.square().sum()
    assert kept > 0.999 * len(strong) / 16  # more than any other directions would on average
    for stage in block.gates:
        kernels = stage.conv_spatial.weight.detach()
        torch.testing.assert_close(kernels.sum((1, 2, 3)), torch.ones(len(kernels)))
        assert torch.equal(kernels, kernels.flip(2)) and torch.equal(kernels, kernels.transpose(2, 3))
        assert kernels[:, 0, 2, 2].max() > 3 * kernels[:, 0, 2, 2].min()
    x = torch.randn(1, 63, 16)
    nn.init.normal_(block.conv_out.weight)
    block(x, grid=(7, 9)).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for name, p in block.named_parameters())


def test_random_start_is_that_of_pytorch():
    torch.manual_seed(0)
    block = DeltaConvBlock(BlockSpec(64, 5))
    random_start(block)
    layers = (block.conv_up, block.gates[1].conv_spatial, block.conv_out, block.conv_pool)
    for layer, inputs in zip(layers, (64, 25, 32, 64), strict=True):
        bound = inputs**-0.5
        for values in layer.parameters():
            assert values.abs().max() <= bound
            assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.35)


def test_taps_switch_modes_and_leave_nothing_behind():
    plain, patched = Attention(), Attention()
    own = lambda x, scale=1.0: x + 7  # noqa: E731 - another extension's forward
    patched.forward = own
    modules = {"a": plain, "b": patched, "left out": Attention()}
    mixers = {site: lambda x, grid: x * 100 for site in ("a", "b")}
    grids = {site: lambda x, call: (1, x.shape[1]) for site in modules}
    x, seen = torch.ones(1, 2, 3), []
    with tapped(modules, mixers, grids) as taps:
        assert plain(x, scale=3.0).unique().item() == 3
        assert patched(x).unique().item() == 8
        with taps.mode(mixing=True, observe=lambda *call: seen.append(call)):
            assert plain(x).unique().item() == 100
            assert modules["left out"](x).unique().item() == 1
        (site, inputs, grid, output) = seen[0]
        assert (site, grid, inputs is x, output.unique().item()) == ("a", (1, 2), True, 100)
        assert len(seen) == 1
        assert plain(x).unique().item() == 1
        assert len(seen) == 1
    assert "forward" not in plain.__dict__ and patched.forward is own
    assert plain(x, scale=3.0).unique().item() == 3


class Attention(nn.Module):
    def forward(self, x, scale=1.0):
        return x * scale
