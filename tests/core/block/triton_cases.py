"""The Triton kernels against the reference: forward and every gradient. `test_triton.py` runs this file.

By hand: `pytest tests/core/block/triton_cases.py` on a GPU, with TRITON_INTERPRET=1 on any machine.
"""

from __future__ import annotations

import importlib
import os

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from deltaconv_core import BlockSpec, DeltaConvBlock
from deltaconv_core.block import reference as slow
from deltaconv_core.block import steps
from deltaconv_core.block.ops import choose
from deltaconv_core.block.ops.by_torch import TorchBackend
from deltaconv_core.block.ops.operators import NAMESPACE
from deltaconv_core.block.ops.triton import BACKEND
from deltaconv_core.mixers.hybrid import HybridMixer, HybridSpec
from deltaconv_core.mixers.hybrid.reference import reference_hybrid
from testing.compare import relative_l2

INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))
DEVICE = "cpu" if INTERPRETED else "cuda"
ODD = (5, 7)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True, scope="session")
def round_to_bfloat16():
    """A GPU rounds to bfloat16; the interpreter cuts the last bits off, which costs twice the error."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(data, source, target, rounding):
        if source.is_fp32() and target.is_bf16():
            rounded = torch.from_numpy(np.array(data)).bfloat16().view(torch.int16)
            return rounded.numpy().view(np.uint16)
        return original(data, source, target, rounding)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", convert)
        yield


def run(function, tensors, upstream):
    """The result and the gradient of each tensor."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*tensors)
    y.backward(upstream.to(y))
    return [y.detach(), *(t.grad for t in tensors)]


def check(fast, plain, exact, tensors, names):
    """At most twice the error of plain PyTorch in the same dtype."""
    torch.manual_seed(1)
    tensors = [t.to(DEVICE) for t in tensors]
    doubles = [t.double() for t in tensors]
    upstream = torch.randn_like(exact(*doubles))
    truth = run(exact, doubles, upstream)
    got, expected = run(fast, tensors, upstream), run(plain, tensors, upstream)
    rounding = torch.finfo(tensors[-1].dtype).eps / 2
    for name, a, b, c in zip(["result", *names], got, expected, truth, strict=True):
        assert a.shape == c.shape and a.isfinite().all(), name
        assert relative_l2(a, c) <= max(2 * relative_l2(b, c), rounding), name


@DTYPES
@pytest.mark.parametrize(
    ("size", "channels", "K"), [(ODD, 6, 5), ((9, 18), 40, 3), ((1, 1), 2, 7), ((4, 6), 5, 3)], ids=str
)
def test_depthwise_convolution_without_a_gate(dtype, size, channels, K):
    torch.manual_seed(K)
    u = torch.randn(2, *size, channels, device=DEVICE).to(dtype)
    weight = torch.randn(channels, 1, K, K, device=DEVICE).to(dtype)
    with torch.no_grad():
        y = BACKEND.depthwise(u, weight)
    assert y.dtype == dtype
    assert relative_l2(y, slow.depthwise(u.double(), weight.double(), None)) < torch.finfo(dtype).eps


def test_depthwise_convolution_without_a_gate_has_pytorchs_gradients():
    u = torch.randn(1, *ODD, 6, device=DEVICE, requires_grad=True)
    weight = torch.randn(6, 1, 3, 3, device=DEVICE, requires_grad=True)
    BACKEND.depthwise(u, weight).sum().backward()
    expected = torch.ones(1, 6, *ODD, device=DEVICE)
    exact = torch.autograd.grad(
        F.conv2d(u.permute(0, 3, 1, 2), weight, padding=1, groups=6), [u, weight], expected
    )
    torch.testing.assert_close([u.grad, weight.grad], list(exact))


@pytest.mark.parametrize("share", ["head", "channel"])
def test_the_local_part_of_a_hybrid_mixer(share):
    spec = HybridSpec(8, 2, 4, landmarks=6, nystrom="none", kernel_size=3, scales=(1.0, 0.5), share=share)
    mixer = HybridMixer(spec, device=DEVICE).requires_grad_(False)
    for kernel in mixer.kernels:
        torch.nn.init.normal_(kernel)
    q, k, v = (torch.randn(2, 35, 2, 4, device=DEVICE).transpose(1, 2) for _ in range(3))
    weights = {name: weight.double() for name, weight in mixer.state_dict().items()}
    exact = reference_hybrid(*(t.double() for t in (q, k, v)), ODD, spec, weights)
    with choose.forced("triton"):
        assert relative_l2(mixer(q, k, v, ODD), exact) < 1e-6


def plain_gate(kind):
    def function(u, weight, bias=None):
        v = F.conv2d(u.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
        a, b = v.permute(0, 2, 3, 1).chunk(2, dim=3)
        if kind == "sigmoid":
            return a * torch.sigmoid(b)
        return a * (b * (a.shape[3] ** 0.5 if kind == "simple" else u.shape[3] ** -0.5))

    return function


def check_gate(K, size, channels, kind, dtype, bias, batch=1):
    torch.manual_seed(K)
    tensors = [torch.randn(batch, *size, channels).to(dtype), (torch.randn(channels, 1, K, K) / K).to(dtype)]
    names = ["u", "weight"]
    if bias:
        tensors.append(torch.randn(channels).to(dtype))
        names.append("bias")

    def exact(u, w, b=None):
        return slow.gated(slow.depthwise(u, w, b), kind)

    # A CPU's library adds up float32 in several sums; the reference, like a GPU, in one, tap by tap.
    plain = exact if dtype == torch.float32 else plain_gate(kind)
    check(lambda u, w, b=None: BACKEND.depthwise_gate(u, w, b, kind), plain, exact, tensors, names)


@pytest.mark.parametrize("K", [1, 3, 5, 7, 9, 11, 13, 15, 17])
def test_gate_of_every_kernel_size(K):
    kinds = ("simple", "sigmoid", "scaled")
    check_gate(K, ODD, 12, kinds[K // 2 % 3], torch.float32, bias=K % 4 == 1)


@DTYPES
@pytest.mark.parametrize("kind", ["simple", "sigmoid", "scaled"])
def test_gate_in_every_dtype(kind, dtype):
    check_gate(3, ODD, 20, kind, dtype, bias=True)


@pytest.mark.parametrize(
    ("size", "channels", "batch"),
    [((1, 1), 2, 2), ((1, 9), 6, 3), ((9, 1), 4, 1), ((19, 2), 4, 1), ((2, 21), 4, 1), ((3, 4), 134, 2)],
    ids=["one position", "one row", "one column", "tiles of rows", "tiles of columns", "blocks of channels"],
)
def test_gate_of_odd_shapes(size, channels, batch):
    check_gate(5, size, channels, "simple", torch.float32, bias=True, batch=batch)


def test_gate_beyond_float16():
    u = torch.full((1, 2, 2, 8), 300.0, dtype=torch.float16, device=DEVICE)
    weight = torch.ones(8, 1, 1, 1, dtype=torch.float16, device=DEVICE)
    g = BACKEND.depthwise_gate(u, weight, None, "simple")
    torch.testing.assert_close(g, torch.full((1, 2, 2, 4), 300.0 * 300 * 2, device=DEVICE))


@pytest.mark.parametrize("expanded", [False, True])
def test_gate_of_a_bias_that_is_not_contiguous(expanded):
    u, weight = torch.randn(1, *ODD, 12, device=DEVICE), torch.randn(12, 1, 3, 3, device=DEVICE)
    wide = torch.randn(24, device=DEVICE)
    bias = wide[:1].expand(12) if expanded else wide[::2]
    g = BACKEND.depthwise_gate(u, weight, bias, "simple")
    torch.testing.assert_close(g, slow.gated(slow.depthwise(u, weight, bias), "simple"), rtol=1e-4, atol=1e-4)


def test_only_the_gradients_that_are_asked_for():
    u = torch.randn(1, 3, 2, 4, device=DEVICE)
    leaf = torch.randn(4, 1, 3, 3, device=DEVICE).transpose(2, 3).requires_grad_()
    BACKEND.depthwise_gate(u, leaf, None, "simple").sum().backward()
    expected = leaf.detach().clone().requires_grad_()
    slow.gated(slow.depthwise(u, expected, None), "simple").sum().backward()
    assert u.grad is None
    torch.testing.assert_close(leaf.grad, expected.grad)


@pytest.mark.parametrize("scale", [0.5, 1 / 3, 0.25, 0.7])
@pytest.mark.parametrize("size", [(8, 6), ODD, (1, 6), (1, 1)], ids=str)
@pytest.mark.parametrize("pooling", ["average", "bilinear"])
def test_pooling(pooling, size, scale):
    check_pooling(pooling, size, scale, torch.float32)


@DTYPES
def test_pooling_in_every_dtype(dtype):
    check_pooling("average", ODD, 0.5, dtype)


def check_pooling(pooling, size, scale, dtype):
    def plain(u):
        return TorchBackend().shrink(u, scale, pooling)

    x = torch.randn(2, *size, 3).to(dtype)
    check(
        lambda u: BACKEND.shrink(u, scale, pooling),
        plain,
        lambda u: slow.shrunk(u, scale, pooling),
        [x],
        ["u"],
    )


def plain_project(grid, merge):
    def function(*tensors):
        *stages, weight, bias = tensors
        pictures = [g.to(weight.dtype).permute(0, 3, 1, 2) for g in stages]
        full = [F.interpolate(g, size=grid, mode="bilinear", align_corners=False) for g in pictures]
        f = torch.cat(full, dim=1) if merge == "concat" else sum(full)
        return F.linear(f.flatten(2).transpose(1, 2), weight) + bias

    return function


def exact_project(grid, merge):
    def function(*tensors):
        *stages, weight, bias = tensors
        full = [slow.stretched(g, *grid) for g in stages]
        f = torch.cat(full, dim=3) if merge == "concat" else sum(full)
        return f.flatten(1, 2) @ weight.T + bias

    return function


def check_project(grid, sizes, merge, dtype, channels=6, dim=10, batch=2, magnitude=1.0):
    torch.manual_seed(len(sizes))
    of_stages = torch.float32 if dtype == torch.float16 else dtype
    stages = [(torch.randn(batch, *size, channels) * magnitude).to(of_stages) for size in sizes]
    merged = channels * (len(sizes) if merge == "concat" else 1)
    weight = (torch.randn(dim, merged) / magnitude).to(dtype)
    check(
        lambda *t: BACKEND.project(t[:-2], t[-2], t[-1], grid, merge),
        plain_project(grid, merge),
        exact_project(grid, merge),
        [*stages, weight, torch.randn(batch, 1, dim).to(dtype)],
        [*(f"stage {i}" for i in range(len(sizes))), "weight", "bias"],
    )


@pytest.mark.parametrize("merge", ["concat", "sum"])
@pytest.mark.parametrize(
    "sizes",
    [[ODD], [(2, 3)], [(2, 3), ODD], [ODD, (2, 3), (1, 2)], [(1, 1), (2, 3), (1, 2), ODD]],
    ids=str,
)
def test_projection_of_stages(sizes, merge):
    check_project(ODD, sizes, merge, torch.float32)


@DTYPES
def test_projection_in_every_dtype(dtype):
    check_project(ODD, [ODD, (2, 3)], "concat", dtype)


@pytest.fixture(params=[None, "6.4"], ids=["NVIDIA", "AMD"])
def vendor(request, monkeypatch):
    if DEVICE != "cpu" and request.param != torch.version.hip:
        pytest.skip("another vendor's GPU")
    monkeypatch.setattr(torch.version, "hip", request.param)


@pytest.mark.usefixtures("vendor")
def test_projection_rounds_to_the_nearest():
    """Cut off, each of these would lose nearly a unit in the last place, and the sum as much."""
    stage = torch.full((1, 2, 2, 64), 1 + 15 * 2.0**-14, device=DEVICE)
    weight = torch.full((16, 64), 1 / 64, device=DEVICE).half()
    y = BACKEND.project([stage], weight, torch.zeros(1, 1, 16, device=DEVICE), (2, 2), "concat")
    assert y.eq(1 + 2.0**-10).all()


@pytest.mark.usefixtures("vendor")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_projection_hides_no_missing_number(value):
    stage = torch.ones(1, *ODD, 40, device=DEVICE)
    stage[0, 1, 2, 3] = value
    if value != value:  # as a GPU makes it
        stage.view(torch.int32)[0, 1, 2, 3] = 0x7FFFFFFF
    weight, bias = torch.ones(10, 40, device=DEVICE).half(), torch.zeros(1, 1, 10, device=DEVICE)
    y = BACKEND.project([stage], weight, bias, ODD, "concat").unflatten(1, ODD)
    assert not y[0, 1, 2].isfinite().any() and y.isfinite().sum() == y.numel() - 10


@pytest.mark.parametrize(
    ("grid", "sizes"),
    [
        ((1, 6), [(1, 6), (1, 3)]),
        ((9, 1), [(9, 1), (4, 1)]),
        ((1, 1), [(1, 1), (1, 1)]),
        ((11, 13), [(11, 13), (5, 6)]),
    ],
    ids=str,
)
def test_projection_of_odd_grids(grid, sizes):
    check_project(grid, sizes, "concat", torch.float32, batch=1)


@DTYPES
@pytest.mark.parametrize("batch", [1, 3])
def test_projection_of_planes(dtype, batch):
    torch.manual_seed(0)
    of_stages = torch.float32 if dtype == torch.float16 else dtype
    planes = [torch.randn(batch, 40, *size, device=DEVICE).to(of_stages) for size in (ODD, (2, 3))]
    views = [stage.permute(0, 2, 3, 1) for stage in planes]
    weight, bias = (
        torch.randn(10, 80, device=DEVICE).to(dtype),
        torch.randn(batch, 1, 10, device=DEVICE).to(dtype),
    )
    with torch.no_grad():
        y = BACKEND.project(views, weight, bias, ODD, "concat")
        assert torch.equal(y, BACKEND.project([s.contiguous() for s in views], weight, bias, ODD, "concat"))


def test_projection_of_more_channels_than_a_tile():
    check_project((3, 2), [(3, 2), (1, 1)], "concat", torch.float32, channels=40, dim=130, batch=1)


def test_projection_refuses_one_bias_for_several_images():
    stage, weight = torch.randn(2, *ODD, 6, device=DEVICE), torch.randn(10, 6, device=DEVICE)
    with pytest.raises(ValueError, match=r"bias has shape \(1, 1, 10\); it must be \(B, 1, C\)"):
        BACKEND.project([stage], weight, torch.zeros(1, 1, 10, device=DEVICE), ODD, "concat")


@pytest.mark.usefixtures("vendor")
@DTYPES
@pytest.mark.parametrize("magnitude", [1e-2, 1e3, 3e4, 1e6])
def test_projection_of_stages_beyond_float16(dtype, magnitude):
    torch.manual_seed(0)
    of_stages = torch.float32 if dtype == torch.float16 else dtype
    stages = [(torch.randn(1, *s, 40, device=DEVICE) * magnitude).to(of_stages) for s in (ODD, (2, 3))]
    weight = (torch.randn(10, 80, device=DEVICE) / magnitude).clamp(-100, 100).to(dtype)
    bias = torch.zeros(1, 1, 10, device=DEVICE)
    y = BACKEND.project(stages, weight, bias, ODD, "concat")
    exact = exact_project(ODD, "concat")(*(t.double() for t in (*stages, weight, bias)))
    assert relative_l2(y, exact) < torch.finfo(dtype).eps


@pytest.fixture
def two_images(monkeypatch):
    """As if a GPU took two images at once; the sizes of all grids."""
    launch = importlib.import_module("deltaconv_core.block.ops.triton.launch")
    monkeypatch.setattr(launch, "MOST_IMAGES", 2)
    original, grids = launch.InterpretedKernel.launch, []

    def noted(self, key, tensors, call):
        grids.append(call().grid(self.tiles))
        original(self, key, tensors, call)

    monkeypatch.setattr(launch.InterpretedKernel, "launch", noted)
    return grids


@pytest.mark.skipif(not INTERPRETED, reason="looks into the interpreter's launches")
def test_more_images_than_a_grid_has_room_for(two_images):
    check_gate(3, ODD, 4, "simple", torch.float32, bias=True, batch=5)
    check_project(ODD, [ODD, (2, 3)], "concat", torch.float32, batch=5)
    x = torch.randn(5, *ODD, 3)
    plain = TorchBackend().shrink(x, 0.5, "average")
    torch.testing.assert_close(BACKEND.shrink(x, 0.5, "average"), plain)
    weight_gradient = 3  # the rows of its kernel are the second axis
    assert two_images and all(max(grid[1:]) <= 2 or grid[1] == weight_gradient for grid in two_images)


SPECS = {
    "release": BlockSpec(16, 5),
    "earlier block": BlockSpec(12, 3, gate="sigmoid", pooling="bilinear", depthwise_bias=True),
    "three scales": BlockSpec(12, 3, scales=(1.0, 0.5, 1 / 3), gate="scaled", merge="sum"),
}


@pytest.fixture
def forced():
    with choose.forced("triton"):
        yield


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize(
    ("name", "compiled"), [*((name, False) for name in SPECS), ("release", True), ("earlier block", True)]
)
def test_whole_block(name, compiled):
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = DeltaConvBlock(SPECS[name]).to(DEVICE)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 35, block.spec.dim, device=DEVICE)
    upstream = torch.randn_like(x)
    weights = dict(block.named_parameters())
    run_block = torch.compile(block, backend="aot_eager", fullgraph=True) if compiled else block

    exact = run(lambda x, *w: slow.reference_block(x, ODD, block.spec, dict(zip(weights, w, strict=True))),
                [x, *weights.values()], upstream)  # fmt: skip
    x = x.requires_grad_()
    y = run_block(x, ODD)
    y.backward(upstream)
    for name, a, b in zip(["result", "x", *weights], [y, x.grad, *(w.grad for w in weights.values())], exact,
                          strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(run_block(x, ODD), y)


@pytest.mark.usefixtures("forced")
@DTYPES
@pytest.mark.parametrize(
    ("name", "grid"), [("release", (5, 7)), ("release", (1, 1)), ("three scales", (9, 1))], ids=str
)
def test_whole_block_at_once(name, grid, dtype):
    torch.manual_seed(0)
    block = DeltaConvBlock(SPECS[name]).to(DEVICE)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    weights = {key: w.detach().to(dtype).double() for key, w in block.named_parameters()}
    x = torch.randn(3, grid[0] * grid[1], block.spec.dim, device=DEVICE).to(dtype)
    layers = [block.conv_up, block.conv_pool, *(s.conv_spatial for s in block.stages()), block.conv_out]
    for given in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        with torch.inference_mode():
            y = steps.at_once(block.spec, layers, given, grid)
        assert y.dtype == dtype and y.is_contiguous()
        exact = slow.reference_block(x.double(), grid, block.spec, weights)
        assert relative_l2(y, exact) < 8 * torch.finfo(dtype).eps


class Lent:
    """Counts what is lent, and what comes back."""

    out, back = 0, 0

    def __init__(self, layer):
        self.layer = layer

    def __enter__(self):
        Lent.out += 1
        return self.layer.weight, self.layer.bias

    def __exit__(self, *error):
        Lent.back += 1


class Lending:
    class Linear(torch.nn.Linear):
        def lend_weights(self, x):
            return Lent(self)

    class Conv2d(torch.nn.Conv2d):
        def lend_weights(self, x):
            return Lent(self)


@pytest.mark.usefixtures("forced")
def test_whole_block_at_once_borrows_weights_and_gives_them_back():
    plain = DeltaConvBlock(SPECS["release"]).to(DEVICE)
    lending = DeltaConvBlock(SPECS["release"], operations=Lending).to(DEVICE)
    lending.load_state_dict(plain.state_dict())
    x = torch.randn(2, 35, plain.spec.dim, device=DEVICE)
    Lent.out = Lent.back = 0
    with torch.inference_mode():
        torch.testing.assert_close(lending(x, ODD), plain(x, ODD))
    assert Lent.out == Lent.back == 5


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_whole_block_under_autocast(name, dtype, grad):
    """The block's weights and the tokens are float32, as in distillation."""
    torch.manual_seed(0)
    block = DeltaConvBlock(SPECS[name]).to(DEVICE)
    x = torch.randn(2, 35, block.spec.dim, device=DEVICE)
    weights = dict(block.named_parameters())
    upstream = torch.randn_like(x)
    exact = run(
        lambda *w: slow.reference_block(x, ODD, block.spec, dict(zip(weights, w, strict=True))),
        list(weights.values()),
        upstream,
    )
    with torch.autocast(DEVICE, dtype), torch.set_grad_enabled(grad):
        y = block(x, ODD)
    assert y.dtype == torch.float32
    tolerance = 8 * torch.finfo(dtype).eps
    assert relative_l2(y, exact[0]) < tolerance
    if grad:
        y.backward(upstream)
        for (name, w), gradient in zip(weights.items(), exact[1:], strict=True):
            assert relative_l2(w.grad, gradient) < tolerance, name


@pytest.mark.parametrize("name", SPECS)
def test_operations_are_counted_as_those_of_plain_pytorch(name):
    block = DeltaConvBlock(SPECS[name]).to(DEVICE)
    x = torch.randn(2, 35, block.spec.dim, device=DEVICE)
    assert BACKEND.why_not(x) is None  # loads the kernels: a counter knows what was there before it
    counted = {}
    for side in ("torch", "triton"):
        # The kernels multiply smaller stages before they enlarge them, and sum what comes out.
        with choose.forced(side), torch.no_grad(), FlopCounterMode(display=False) as counter:
            block(x, ODD)
        counted[side] = counter.get_total_flops()
    if block.spec.merge == "concat":
        assert counted["triton"] == counted["torch"]
    else:
        assert counted["triton"] > counted["torch"]


def test_operations_of_gradients_are_counted():
    operators = getattr(torch.ops, NAMESPACE)
    u, weight = torch.randn(1, 2, 3, 4, device=DEVICE), torch.randn(4, 1, 5, 5, device=DEVICE)
    g = torch.randn(1, 2, 3, 2, device=DEVICE)
    with FlopCounterMode(display=False) as counter:
        operators.depthwise_gate_gradients(g, u, weight, None, "simple", [True, False, False])
    assert counter.get_total_flops() == 2 * 2 * u.numel() * 25


def test_operators_as_pytorch_wants_them():
    operators = getattr(torch.ops, NAMESPACE)
    u, weight = torch.randn(1, 2, 3, 4, device=DEVICE), torch.randn(4, 1, 3, 3, device=DEVICE)
    g = torch.randn(1, 2, 3, 2, device=DEVICE)
    calls = [
        (operators.pool.default, (u, 1, 2, False)),
        (operators.enlarge_adjoint.default, (u, 1, 2)),
        (operators.depthwise_gate.default, (u, weight, None, "simple")),
        (operators.depthwise.default, (u, weight)),
        (operators.depthwise_gate_gradients.default, (g, u, weight, None, "simple", [True, True, False])),
        (operators.project.default, ([g], u.new_ones(5, 2), u.new_zeros(1, 1, 5), 2, 3, True)),
    ]  # fmt: skip
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
