"""The distillation losses by hand, the warm start against attention itself, and taps that leave no trace."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deltaconv_core import BlockSpec, DeltaConvBlock
from deltaconv_core.distill import feature_loss, min_snr_weight, output_losses, tapped, warm_start
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


def test_feature_loss_sums_layers_of_different_sizes():
    students = [torch.zeros(2, 3), torch.ones(5, 4)]
    teachers = [torch.full((2, 3), 2.0), torch.zeros(5, 4)]
    assert feature_loss(students, teachers).item() == pytest.approx(4.0 + 1.0)


@pytest.mark.parametrize(("students", "teachers"), [(0, 0), (1, 2)])
def test_feature_loss_refuses_other_numbers_of_layers(students, teachers):
    with pytest.raises(DeltaConvError, match=f"{students} and {teachers}"):
        feature_loss([torch.zeros(1)] * students, [torch.zeros(1)] * teachers)


@pytest.mark.parametrize("biased", [False, True])
def test_warm_start_is_uniform_attention(biased):
    torch.manual_seed(0)
    dim, heads, grid = 16, 2, (3, 5)
    to_q, to_k = nn.Linear(dim, dim), nn.Linear(dim, dim)
    to_v, to_out = nn.Linear(dim, dim, bias=biased), nn.Linear(dim, dim)
    nn.init.zeros_(to_q.weight)  # equal scores: every token attends to all others alike
    nn.init.zeros_(to_q.bias)
    x = torch.randn(2, math.prod(grid), dim)
    q, k, v = (layer(x).unflatten(2, (heads, -1)).transpose(1, 2) for layer in (to_q, to_k, to_v))
    attention = to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    block = DeltaConvBlock(BlockSpec(dim, 3))
    warm_start(block, to_v.weight, to_out.weight, to_out.bias, to_v.bias)
    torch.testing.assert_close(block(x, grid=grid), attention)


class Attention(nn.Module):
    def forward(self, x, scale=1.0):
        return x * scale


def test_taps_switch_modes_and_leave_nothing_behind():
    plain, patched = Attention(), Attention()
    own = lambda x, scale=1.0: x + 7  # noqa: E731 - another extension's forward
    patched.forward = own
    modules = {"a": plain, "b": patched}
    mixers = {site: lambda x, grid: x * 100 for site in modules}
    grids = {site: lambda x, call: (1, x.shape[1]) for site in modules}
    x = torch.ones(1, 2, 3)
    with tapped(modules, mixers, grids) as taps:
        assert plain(x, scale=3.0).unique().item() == 3
        assert patched(x).unique().item() == 8
        assert taps["a"].take()[1] == (1, 2)
        with pytest.raises(RuntimeError):
            taps["a"].take()
        taps["a"].mixing = True
        assert plain(x).unique().item() == 100
    assert "forward" not in plain.__dict__ and patched.forward is own
    assert plain(x, scale=3.0).unique().item() == 3
