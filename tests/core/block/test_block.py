"""The block against its reference: forward and every gradient, at odd sizes and in every dtype."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from deltaconv_core import BlockSpec, DeltaConvBlock, DeltaConvError
from deltaconv_core.block.reference import reference_block
from testing.compare import relative_l2

VARIANTS = {
    "release": BlockSpec(16, 5),
    "pixart": BlockSpec(12, 13, gate="sigmoid"),
    "paper": BlockSpec(16, 3, gate="scaled", merge="sum"),
    "earlier block": BlockSpec(16, 5, gate="sigmoid", pooling="bilinear", depthwise_bias=True),
    "three scales": BlockSpec(24, 7, scales=(1.0, 0.5, 1 / 3), depthwise_bias=True),
    "sum of three": BlockSpec(8, 3, scales=(0.25, 1.0, 0.5), merge="sum", pooling="bilinear"),
    "one scale": BlockSpec(20, 9, scales=(1.0,), ratio=0.3),
    "context": BlockSpec(16, 5, context=True),
    "sigmoid context": BlockSpec(12, 3, gate="sigmoid", context=True, scales=(0.5,)),
    "lean": BlockSpec.lean(32, 5),
    "wide": BlockSpec(6, 1, ratio=2.0, gate="scaled"),
}
GRIDS = [(8, 8), (7, 5), (1, 6), (9, 1), (1, 1), (3, 14)]


def plain_block(x, grid, spec, w):
    """The block in plain PyTorch: nn.functional in the input's dtype, nothing clever."""
    height, width = grid
    tokens = x
    z = F.linear(x, w["conv_up.weight"], w["conv_up.bias"]).transpose(1, 2)
    z = z.reshape(x.shape[0], spec.inter, height, width)
    gate = {
        "simple": lambda a, b: a * (b * (spec.inter / 2) ** 0.5),
        "sigmoid": lambda a, b: a * torch.sigmoid(b),
        "scaled": lambda a, b: a * b / spec.inter**0.5,
    }[spec.gate]
    stages = []
    for i, scale in enumerate(spec.scales):
        size = (max(1, int(height * scale)), max(1, int(width * scale)))
        f = z
        if scale != 1 and spec.pooling == "average":
            f = F.adaptive_avg_pool2d(z, size)
        elif scale != 1 and (height * scale < 1 or width * scale < 1):
            f = torch.ops.aten.upsample_bilinear2d(z, size, False, scale, scale)
        elif scale != 1:
            f = F.interpolate(z, scale_factor=scale, mode="bilinear", align_corners=False)
        kernel, bias = w[f"gates.{i}.conv_spatial.weight"], w.get(f"gates.{i}.conv_spatial.bias")
        f = F.conv2d(f, kernel, bias, padding=spec.kernel_size // 2, groups=spec.inter)
        f = gate(*f.chunk(2, dim=1))
        stages.append(f if scale == 1 else F.interpolate(f, size=grid, mode="bilinear", align_corners=False))
    if spec.context:
        a, b = z.chunk(2, dim=1)
        stages.append(gate(gate(a, b).mean(dim=(2, 3), keepdim=True), b))
    f = torch.cat(stages, dim=1) if spec.merge == "concat" else sum(stages)
    y = F.linear(f.flatten(2).transpose(1, 2), w["conv_out.weight"], w["conv_out.bias"])
    return y + F.linear(tokens.mean(dim=1, keepdim=True), w["conv_pool.weight"], w["conv_pool.bias"])


def seeded_block(spec, dtype=torch.float32, scale=0.3):
    torch.manual_seed(spec.dim * 100 + spec.kernel_size)
    block = DeltaConvBlock(spec, dtype=dtype)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=scale)
    return block


def run(function, x, parameters, upstream):
    """Output and the gradient of x and of every parameter."""
    x = x.detach().clone().requires_grad_()
    parameters = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    y = function(x, parameters)
    y.backward(upstream.to(y.dtype))
    return {"output": y.detach(), "x": x.grad, **{name: p.grad for name, p in parameters.items()}}


def functional(block):
    return lambda x, grid, parameters: torch.func.functional_call(block, parameters, (x, grid))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_equals_reference_in_float64(name, grid, batch):
    spec = VARIANTS[name]
    block = seeded_block(spec, torch.float64)
    x = torch.randn(batch, grid[0] * grid[1], spec.dim, dtype=torch.float64)
    upstream = torch.randn_like(x)
    weights = dict(block.named_parameters())
    truth = run(lambda x, w: reference_block(x, grid, spec, w), x, weights, upstream)
    got = run(lambda x, w: functional(block)(x, grid, w), x, weights, upstream)
    assert got.keys() == truth.keys()
    for what in truth:
        torch.testing.assert_close(got[what], truth[what], rtol=1e-9, atol=1e-9, msg=what)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grid", [(7, 5), (1, 6), (11, 6)], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_error_is_at_most_twice_that_of_plain_pytorch(name, grid, dtype):
    spec = VARIANTS[name]
    block = seeded_block(spec, dtype)
    x = torch.randn(3, grid[0] * grid[1], spec.dim).to(dtype)
    upstream = torch.randn(x.shape).to(dtype)
    weights = dict(block.named_parameters())
    exact = {key: value.double() for key, value in weights.items()}
    truth = run(lambda x, w: reference_block(x, grid, spec, w), x.double(), exact, upstream)
    plain = run(lambda x, w: plain_block(x, grid, spec, w), x, weights, upstream)
    fast = run(lambda x, w: functional(block)(x, grid, w), x, weights, upstream)
    rounding = torch.finfo(dtype).eps / 2
    for what in truth:
        assert fast[what].dtype == dtype
        allowed = 2 * relative_l2(plain[what], truth[what])
        assert relative_l2(fast[what], truth[what]) <= max(allowed, rounding), what


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("sign", ["random", "constant"])
def test_large_inputs_stay_finite(name, dtype, sign):
    spec = VARIANTS[name]
    block = seeded_block(spec, dtype, scale=0.1)
    # The context stage grows with the third power of x, so less of it fits into float16.
    x = torch.full((2, 35, spec.dim), 20.0 if spec.context else 100.0) * (
        torch.randn(2, 35, spec.dim).sign() if sign == "random" else 1
    )
    x = x.to(dtype)
    truth = reference_block(x.double(), (7, 5), spec, {k: v.double() for k, v in block.state_dict().items()})
    assert truth.abs().max() < torch.finfo(dtype).max, "the case asks for more than the dtype holds"
    y = block(x, (7, 5))
    assert y.isfinite().all()
    assert relative_l2(y, truth) < 4 * torch.finfo(dtype).eps


def test_float16_is_never_computed_on_a_cpu():
    seen = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten.convolution.default, torch.ops.aten.addmm.default):
                seen.update(a.dtype for a in args if isinstance(a, torch.Tensor))
            return function(*args, **(kwargs or {}))

    block = seeded_block(VARIANTS["release"], torch.float16)
    with Watch():
        assert block(torch.randn(1, 35, 16).half(), (7, 5)).dtype == torch.float16
    assert seen == {torch.float32}


@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_computes_in_the_dtype_of_the_tokens(weights):
    block = seeded_block(VARIANTS["earlier block"]).to(weights)
    x = torch.randn(2, 35, 16)
    stored = {name: p.float() for name, p in block.state_dict().items()}
    torch.testing.assert_close(block(x, (7, 5)), reference_block(x, (7, 5), block.spec, stored))


@pytest.mark.parametrize("view", ["transposed", "strided", "expanded", "reversed batch"])
def test_any_strides(view):
    block = seeded_block(VARIANTS["release"])
    x = {
        "transposed": torch.randn(2, 16, 35).transpose(1, 2),
        "strided": torch.randn(2, 70, 32)[:, ::2, ::2],
        "expanded": torch.randn(1, 35, 16).expand(2, -1, -1),
        "reversed batch": torch.randn(35, 2, 16).transpose(0, 1),
    }[view]
    assert not x.is_contiguous()
    torch.testing.assert_close(block(x, (7, 5)), block(x.contiguous(), (7, 5)))
    torch.testing.assert_close(block(x, (7, 5)), reference_block(x, (7, 5), block.spec, block.state_dict()))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_fresh_block_trains_every_parameter_from_a_small_output(name):
    torch.manual_seed(0)
    block = DeltaConvBlock(VARIANTS[name])
    y = block(torch.randn(4, 63, block.spec.dim), (9, 7))
    assert 0.001 < y.std() < 0.1
    (y - torch.randn_like(y)).square().sum().backward()
    for parameter_name, parameter in block.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, parameter_name


def test_gradcheck():
    block = seeded_block(BlockSpec(4, 3, depthwise_bias=True), torch.float64)
    x = torch.randn(2, 15, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: block(x, (3, 5)), x)


@pytest.mark.parametrize(
    ("shape", "grid", "message"),
    [
        ((1, 35, 16), (7, 6), r"7 x 6 = 42 tokens, got 35.*HyperTile"),
        ((1, 35, 8), (7, 5), r"\(B, H\*W, 16\), got \(1, 35, 8\)"),
        ((35, 16), (7, 5), r"\(B, H\*W, 16\), got \(35, 16\)"),
        ((1, 0, 16), (0, 5), "at least 1 x 1, got 0 x 5"),
    ],
)
def test_refuses_tokens_that_do_not_fit(shape, grid, message):
    with pytest.raises(DeltaConvError, match=message):
        seeded_block(VARIANTS["release"])(torch.zeros(shape), grid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_image_at_all(dtype):
    x = torch.zeros(0, 35, 8, dtype=dtype, requires_grad=True)
    y = DeltaConvBlock(BlockSpec(8, 3))(x, (7, 5))
    assert y.shape == x.shape and y.dtype == dtype
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_refuses_whole_numbers():
    with pytest.raises(DeltaConvError, match="floating point tokens, got torch.int64"):
        seeded_block(VARIANTS["release"])(torch.zeros(1, 35, 16, dtype=torch.int64), (7, 5))


def test_parameter_names_follow_the_release():
    names = set(DeltaConvBlock(BlockSpec(8, 3), device="meta").state_dict())
    linear = {
        f"{layer}.{kind}" for layer in ("conv_up", "conv_out", "conv_pool") for kind in ("weight", "bias")
    }
    assert names == linear | {f"gates.{i}.conv_spatial.weight" for i in (0, 1)}


def test_copies_and_moves_like_any_module():
    block = seeded_block(VARIANTS["pixart"])
    twin = copy.deepcopy(block).to(torch.float64)
    assert twin.spec == block.spec and twin.conv_up.weight.dtype == torch.float64
    assert block.conv_up.weight.dtype == torch.float32
