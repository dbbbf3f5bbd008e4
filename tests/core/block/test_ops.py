"""The operators and the reference's own steps, against PyTorch's functions and arithmetic by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deltaconv_core import BlockSpec, DeltaConvBlock
from deltaconv_core.block import ops
from deltaconv_core.block import reference as slow
from deltaconv_core.block.steps import project_half
from testing.compare import relative_l2

SIZES = [(8, 8), (7, 5), (1, 6), (9, 2), (1, 1)]


def last(x):
    """(B, c, h, w) -> (B, h, w, c), the reference's layout."""
    return x.permute(0, 2, 3, 1)


@pytest.mark.parametrize("scale", [0.5, 1 / 3, 0.25, 0.7])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_average_pooling(size, scale):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    target = (max(1, int(size[0] * scale)), max(1, int(size[1] * scale)))
    expected = F.adaptive_avg_pool2d(x, target)
    torch.testing.assert_close(ops.shrink(x, scale, "average"), expected)
    torch.testing.assert_close(slow.shrunk(last(x), scale, "average"), last(expected))


@pytest.mark.parametrize("scale", [0.5, 1 / 3, 0.7])
@pytest.mark.parametrize("size", [(7, 5), (15, 11), (11, 4)], ids=str)
def test_average_pooling_on_apple_s_gpus(size, scale, monkeypatch):
    class Place(str):
        type = "mps"

    class There(torch.Tensor):
        device = Place("cpu")

    x = torch.randn(2, 3, *size)
    expected = F.adaptive_avg_pool2d(x, ops.stage_size(size, scale))
    monkeypatch.delattr(F, "adaptive_avg_pool2d")
    torch.testing.assert_close(torch.Tensor(ops.shrink(x.as_subclass(There), scale, "average")), expected)


@pytest.mark.parametrize("scale", [0.5, 1 / 3, 0.25, 0.7])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bilinear_pooling_steps_by_the_scale(size, scale):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    got = ops.shrink(x, scale, "bilinear")
    torch.testing.assert_close(slow.shrunk(last(x), scale, "bilinear"), last(got))
    if min(size) * scale >= 1:  # PyTorch's own function has no answer below one row
        torch.testing.assert_close(got, F.interpolate(x, scale_factor=scale, mode="bilinear"))


def test_uneven_windows_by_hand():
    assert slow.windows(7, 3) == [(0, 3), (2, 5), (4, 7)]
    rows = torch.arange(7.0).reshape(1, 1, 7, 1)
    assert ops.shrink(rows, 0.5, "average").flatten().tolist() == [1, 3, 5]
    assert ops.shrink(rows, 0.5, "bilinear").flatten().tolist() == [0.5, 2.5, 4.5]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_enlarging(size):
    x = torch.randn(2, 3, *ops.stage_size(size, 0.5), dtype=torch.float64)
    expected = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(ops.enlarge(x, size), expected)
    torch.testing.assert_close(slow.stretched(last(x), *size), last(expected))


@pytest.mark.parametrize("kernel_size", [1, 3, 7])
def test_reference_depthwise_convolution(kernel_size):
    x, bias = torch.randn(2, 4, 5, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    kernel = torch.randn(4, 1, kernel_size, kernel_size, dtype=torch.float64)
    expected = F.conv2d(x, kernel, bias, padding=kernel_size // 2, groups=4)
    torch.testing.assert_close(slow.depthwise(last(x), kernel, bias), last(expected))


@pytest.mark.parametrize(
    ("kind", "expected"), [("simple", 2 * 3 * 2**0.5), ("scaled", 2 * 3 / 2), ("sigmoid", 2 * 0.9525741)]
)
def test_gates_by_hand(kind, expected):
    x = torch.tensor([2.0, 2.0, 3.0, 3.0]).reshape(1, 4, 1, 1)
    assert ops.gate(x, kind).flatten().tolist() == pytest.approx([expected] * 2)
    assert slow.gated(last(x), kind).flatten().tolist() == pytest.approx([expected] * 2)


def test_float16_gate_beyond_its_range():
    x = torch.full((1, 640, 1, 1), 300.0, dtype=torch.float16)
    assert ops.gate(x, "simple").flatten()[0].item() == pytest.approx(300 * 300 * 320**0.5)


@pytest.mark.parametrize("magnitude", [1e-2, 1.0, 1e3, 1e6])
def test_projection_of_rows_beyond_float16(magnitude):
    torch.manual_seed(0)
    layer = nn.Linear(24, 8, dtype=torch.float16)
    with torch.no_grad():
        layer.weight.mul_(min(1.0, 1e4 / magnitude))
    x = (torch.randn(2, 5, 24) * magnitude).requires_grad_()
    x.data[0, 0] = 0
    offset = torch.randn(2, 1, 8).half()
    truth = x.double() @ layer.weight.double().T + layer.bias.double() + offset.double()
    y = project_half(layer, x, offset)
    assert relative_l2(y, truth) < 1e-3
    upstream = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, [x], upstream)
    (expected,) = torch.autograd.grad(truth, [x], upstream.double())
    assert relative_l2(got, expected) < 2e-3


def test_projection_within_float16_is_the_plain_one():
    layer, x = nn.Linear(24, 8, dtype=torch.float16), torch.randn(2, 5, 24)
    y = project_half(layer, x, torch.zeros(1, 1, 8).half())
    assert torch.equal(y.half(), layer(x.half()))


class Castable:
    """A host's namespace: layers that cast their own weights and count their calls."""

    calls = 0

    class Linear(nn.Linear):
        comfy_cast_weights = True

        def forward(self, x):
            Castable.calls += 1
            return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

    class Conv2d(nn.Conv2d):
        comfy_cast_weights = True

        def forward(self, x):
            Castable.calls += 1
            return self._conv_forward(x, self.weight.to(x.dtype), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layers_of_a_host_are_called(dtype):
    plain = DeltaConvBlock(BlockSpec(16, 3), dtype=torch.bfloat16)
    hosted = DeltaConvBlock(plain.spec, dtype=torch.bfloat16, operations=Castable)
    hosted.load_state_dict(plain.state_dict())
    x = torch.randn(2, 35, 16).to(dtype)
    before = Castable.calls
    y = hosted(x, (7, 5))
    assert Castable.calls - before == 5
    expected = plain(x, (7, 5))
    # Both ways round at other places.
    assert (y - expected).float().norm() <= 2 * torch.finfo(dtype).eps * expected.float().norm()
