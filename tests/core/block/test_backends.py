"""Every formulation of every step against the reference, and which backend is taken."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deltaconv_core import BlockSpec, DeltaConvBlock, DeltaConvError
from deltaconv_core.block import ops, steps
from deltaconv_core.block.ops import by_torch, choose, fastest
from deltaconv_core.block.ops.by_reference import ReferenceBackend
from deltaconv_core.block.reference import reference_block
from testing.compare import relative_l2

GRIDS = [(8, 8), (7, 5), (1, 6), (9, 1), (1, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = [by_torch.TorchBackend(), ReferenceBackend()]
EXACT = ReferenceBackend()
CONVOLUTIONS = [
    (name, kernel_size)
    for kernel_size in (3, 11, 13, 17)
    for name in by_torch.offered(torch.float32, kernel_size)
]


def stages(grid, channels, scales=(1.0, 0.5), batch=2):
    return [torch.randn(batch, *ops.stage_size(grid, s), channels, dtype=torch.float64) for s in scales]


@pytest.mark.parametrize("kind", ["simple", "sigmoid", "scaled"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("name", "kernel_size"), CONVOLUTIONS)
def test_convolutions_with_gate(name, kernel_size, grid, kind):
    torch.manual_seed(0)
    u = torch.randn(2, *grid, 6)
    weight, bias = torch.randn(6, 1, kernel_size, kernel_size), torch.randn(6)
    given = u, weight, bias if kernel_size == 11 else None
    truth = EXACT.depthwise_gate(*(t if t is None else t.double() for t in given), kind)
    for grad in (False, True):
        with fastest.fixed(convolution=name), torch.set_grad_enabled(grad):
            g = BACKENDS[0].depthwise_gate(*given, kind)
        assert g.shape == (2, *grid, 3) and g.stride(3) == 1
        assert relative_l2(g, truth) < 1e-6


@pytest.mark.parametrize(
    ("name", "dtype"), [(n, d) for d in DTYPES for n in by_torch.offered(d, 11)], ids=str
)
def test_rounding_of_convolutions_with_gate(name, dtype):
    torch.manual_seed(0)
    u, weight = torch.randn(2, 9, 7, 8).to(dtype), torch.randn(8, 1, 11, 11).to(dtype)
    truth = EXACT.depthwise_gate(u.double(), weight.double(), None, "simple")
    v = F.conv2d(u.permute(0, 3, 1, 2), weight, padding=5, groups=8)
    a, b = v.chunk(2, dim=1)
    naive = (a * (b * 2)).permute(0, 2, 3, 1)
    with fastest.fixed(convolution=name):
        g = BACKENDS[0].depthwise_gate(u, weight, None, "simple")
    assert g.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    assert relative_l2(g, truth) <= max(2 * relative_l2(naive, truth), torch.finfo(dtype).eps / 2)


def test_a_convolution_of_too_many_entries_is_done_image_by_image(monkeypatch):
    u, weight = torch.randn(3, 4, 5, 6), torch.randn(4, 1, 3, 3)
    expected = by_torch.channels_last(u, weight, None)
    monkeypatch.setattr(by_torch, "CUDNN_ENTRIES", 4 * 5 * 6)
    seen, conv2d = [], F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda u, *a, **k: seen.append(len(u)) or conv2d(u, *a, **k))
    torch.testing.assert_close(by_torch.channels_last(u, weight, None), expected)
    assert seen == [1, 1, 1]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("scales", [(1.0, 0.5), (0.5,), (0.25, 1.0, 0.5), (1.0,)], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("merge", ["concat", "sum"])
@pytest.mark.parametrize("name", by_torch.PROJECTIONS)
def test_projections(name, merge, grid, scales, grad):
    torch.manual_seed(0)
    given = stages(grid, 3, scales)
    weight = torch.randn(10, 3 * (len(scales) if merge == "concat" else 1), dtype=torch.float64)
    bias = torch.randn(2, 1, 10, dtype=torch.float64)
    before = [t.clone() for t in (*given, weight, bias)]
    truth = EXACT.project(given, weight, bias, grid, merge)
    with fastest.fixed(projection=name), torch.set_grad_enabled(grad):
        y = BACKENDS[0].project(given, weight, bias, grid, merge)
    assert y.is_contiguous()
    torch.testing.assert_close(y, truth, rtol=1e-12, atol=1e-12)
    assert all(map(torch.equal, before, (*given, weight, bias))), "an input was written to"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", by_torch.PROJECTIONS)
def test_rounding_of_projections(name, dtype):
    torch.manual_seed(0)
    grid = (7, 6)
    given = [g.to(torch.float32 if dtype == torch.float16 else dtype) for g in stages(grid, 40)]
    weight, bias = torch.randn(24, 80).to(dtype) / 9, torch.randn(2, 1, 24).to(dtype)
    truth = EXACT.project([g.double() for g in given], weight.double(), bias.double(), grid, "concat")
    small = F.interpolate(given[1].to(dtype).permute(0, 3, 1, 2), size=grid, mode="bilinear")
    f = torch.cat([given[0].to(dtype), small.permute(0, 2, 3, 1)], dim=3).flatten(1, 2)
    naive = f @ weight.T + bias
    with fastest.fixed(projection=name), torch.no_grad():
        y = BACKENDS[0].project(given, weight, bias, grid, "concat")
    assert y.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    assert relative_l2(y, truth) <= 2 * relative_l2(naive, truth)


@pytest.mark.parametrize("name", by_torch.PROJECTIONS)
def test_projection_of_more_than_float16_holds(name):
    given = [g.float() * 1e6 for g in stages((4, 4), 8)]
    weight, bias = torch.randn(6, 16).half() * 1e-3, torch.randn(2, 1, 6).half()
    truth = EXACT.project([g.double() for g in given], weight.double(), bias.double(), (4, 4), "concat")
    with fastest.fixed(projection=name), torch.no_grad():
        y = BACKENDS[0].project(given, weight, bias, (4, 4), "concat")
    assert relative_l2(y, truth) < 1e-3


@pytest.mark.parametrize("projection", by_torch.PROJECTIONS)
@pytest.mark.parametrize("convolution", by_torch.offered(torch.float64, 11))
def test_gradients_of_every_formulation(convolution, projection):
    torch.manual_seed(0)
    block = DeltaConvBlock(BlockSpec(8, 11, depthwise_bias=True), dtype=torch.float64)
    x = torch.randn(2, 35, 8, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    weights = dict(block.named_parameters())
    truth = torch.autograd.grad(
        reference_block(x, (7, 5), block.spec, weights), [x, *weights.values()], upstream
    )
    with fastest.fixed(convolution=convolution, projection=projection):
        got = torch.autograd.grad(block(x, (7, 5)), [x, *weights.values()], upstream)
    tolerance = 1e-5 if convolution == "in_float32" else 1e-10
    for name, g, t in zip(["x", *weights], got, truth, strict=True):
        torch.testing.assert_close(g, t, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("pooling", ["average", "bilinear"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("scale", [0.5, 1 / 3])
def test_shrinking(scale, grid, pooling):
    u = torch.randn(2, *grid, 4, dtype=torch.float64)
    truth = EXACT.shrink(u, scale, pooling)
    smaller = BACKENDS[0].shrink(u, scale, pooling)
    assert smaller.is_contiguous() and smaller.shape == truth.shape
    torch.testing.assert_close(smaller, truth)


@pytest.fixture
def triton(monkeypatch):
    """Puts a module, or what importing it raises, where the Triton backend is."""
    choose.choice.reset()

    def put(module):
        def import_module(name, package):
            assert (name, package) == (".triton", "deltaconv_core.block.ops")
            if isinstance(module, BaseException):
                raise module
            return module

        monkeypatch.setattr(choose, "importlib", SimpleNamespace(import_module=import_module))

    yield put
    choose.choice.reset()


class Other(ReferenceBackend):
    """Stands for a backend that can run, or cannot because of `reason`."""

    name = "triton"

    def __init__(self, reason=None):
        self.reason = reason

    def why_not(self, x):
        return self.reason


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "spec",
    [BlockSpec(16, 5), BlockSpec(24, 3, (1.0, 0.5, 1 / 3), "scaled", "sum", "bilinear", True)],
    ids=str,
)
def test_the_reference_as_a_backend(spec, dtype):
    torch.manual_seed(0)
    block, x = DeltaConvBlock(spec, dtype=dtype), torch.randn(2, 35, spec.dim).to(dtype)
    with choose.forced("reference"):
        slow = block(x, (7, 5))
    assert relative_l2(block(x, (7, 5)), slow) < 4 * torch.finfo(dtype).eps


def on_gpu(dtype=torch.float16):
    return SimpleNamespace(device=torch.device("cuda"), dtype=dtype)


def test_without_a_gpu_nothing_but_pytorch_is_tried(triton):
    triton(AssertionError("nobody should import it"))
    assert ops.backend_for(torch.zeros(1)).name == "torch"


@pytest.mark.parametrize(("reason", "name"), [(None, "triton"), ("this GPU is too old", "torch")])
def test_mixers_ask_the_same_backends(triton, reason, name):
    triton(SimpleNamespace(BACKEND=Other(reason)))
    assert ops.backend_for_convolution(torch.zeros(1, 2, 2, 4)).name == "torch"
    assert ops.backend_for_convolution(on_gpu()).name == name


def test_a_gpu_takes_triton(triton):
    other = Other()
    triton(SimpleNamespace(BACKEND=other))
    assert ops.backend_for(on_gpu()) is other


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (ImportError("No module named 'triton'"), "ImportError: No module named 'triton'"),
        (RuntimeError("0 active drivers"), "RuntimeError: 0 active drivers"),
        (ModuleType("half of it"), "AttributeError"),
        (SimpleNamespace(BACKEND=Other("this GPU is too old")), "because this GPU is too old"),
    ],
    ids=["missing", "broken", "halved", "unfit"],
)
def test_a_gpu_without_triton_says_so_once(triton, module, reason, caplog):
    triton(module)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert ops.backend_for(on_gpu()).name == "torch"
    (record,) = caplog.records
    assert reason in record.message and "cuda, torch.float16: plain PyTorch" in record.message


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        ("rocm", None, "one of torch, cuda, triton, reference, got 'rocm'"),
        ("triton", ImportError("none here"), "is triton, but Triton cannot be used here .*none here"),
        ("triton", SimpleNamespace(BACKEND=Other("x is on a CPU")), "but x is on a CPU; unset it"),
    ],
)
def test_a_forced_backend_that_cannot_run(triton, name, module, message):
    triton(module)
    with choose.forced(name), pytest.raises(DeltaConvError, match=message):
        DeltaConvBlock(BlockSpec(8, 3))(torch.zeros(1, 6, 8), (2, 3))


def test_a_forced_backend_runs_wherever_it_can(triton):
    other = Other()
    triton(SimpleNamespace(BACKEND=other))
    with choose.forced("triton"):
        assert ops.backend_for(torch.zeros(1)) is other
    with choose.forced("torch"):
        assert ops.backend_for(on_gpu()).name == "torch"


class Watching(by_torch.TorchBackend):
    """Stands for a backend of kernels, which take one dtype and know nothing of autocast."""

    def depthwise_gate(self, u, weight, bias, kind):
        self.check(u, weight)
        return super().depthwise_gate(u, weight, bias, kind)

    def project(self, stages, weight, bias, grid, merge):
        wide = torch.float32 if self.dtype == torch.float16 else self.dtype
        assert {g.dtype for g in stages} == {wide}
        self.check(weight, bias)
        return super().project(stages, weight, bias, grid, merge)

    def check(self, *tensors):
        assert {t.dtype for t in tensors} == {self.dtype} and not torch.is_autocast_enabled("cpu")


class InterpolatesInFloat32(torch.overrides.TorchFunctionMode):
    """What autocast does on a GPU, and does not on a CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.interpolate, torch.ops.aten.upsample_bilinear2d) and torch.is_autocast_enabled(
            "cpu"
        ):
            args = (args[0].float(), *args[1:])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("projection", by_torch.PROJECTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_ends_before_the_backend(triton, dtype, projection, grad):
    torch.manual_seed(0)
    backend = Watching()
    backend.dtype = dtype
    triton(SimpleNamespace(BACKEND=backend))
    block = DeltaConvBlock(BlockSpec(16, 3, (1.0, 0.5, 1 / 3), pooling="bilinear", depthwise_bias=True))
    x = torch.randn(2, 35, 16)
    truth = block(x, (7, 5))
    with (
        choose.forced("triton"),
        fastest.fixed(projection=projection),
        InterpolatesInFloat32(),
        torch.autocast("cpu", dtype),
        torch.set_grad_enabled(grad),
    ):
        y = block(x, (7, 5))
        assert torch.is_autocast_enabled("cpu")
    assert y.dtype == torch.float32
    assert relative_l2(y, truth) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("where", ["conv_up", "conv_pool"])
def test_autocast_beside_layers_that_have_to_be_called(triton, where):
    """Such a layer answers in the dtype of what it is given."""
    backend = Watching()
    triton(SimpleNamespace(BACKEND=backend))
    block, x = DeltaConvBlock(BlockSpec(16, 3)).bfloat16(), torch.randn(2, 35, 16)
    meddled(block.get_submodule(where), "forward")
    backend.dtype = torch.float32 if where == "conv_up" else torch.bfloat16
    with choose.forced("triton"), torch.autocast("cpu", torch.bfloat16):
        assert block(x, (7, 5)).dtype == torch.float32


class Lending(nn.Linear):
    """A host's layer whose forward must not be needed."""

    returned = False

    @contextlib.contextmanager
    def lend_weights(self, x):
        yield self.weight.to(x.dtype) * 2, None
        self.returned = True


def test_layers_that_lend_their_weights():
    layer = Lending(3, 2, dtype=torch.bfloat16)
    assert steps.lends_weights(layer)
    with steps.borrowed(layer, torch.zeros(1)) as (weight, bias):
        assert not layer.returned
    assert torch.equal(weight, layer.weight.float() * 2) and bias is None and layer.returned


def meddled(layer, how):
    if how == "hook":
        layer.register_forward_hook(lambda module, args, output: output * 2)
    elif how == "pre-hook":
        layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    elif how == "forward":
        inner = layer.forward
        layer.forward = lambda x: inner(x) * 2
    elif how == "parametrization":
        nn.utils.parametrizations.weight_norm(layer)
    return layer


@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward", "parametrization"])
@pytest.mark.parametrize("where", ["conv_out", "gates.1.conv_spatial", "conv_up", "conv_pool"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_that_do_more_than_their_weights_say(where, how, dtype):
    """Their weights are float32 in any case."""
    torch.manual_seed(0)
    spec = BlockSpec(8, 3)
    block, twin = DeltaConvBlock(spec), DeltaConvBlock(spec)
    twin.load_state_dict(block.state_dict())
    x = torch.randn(2, 12, 8).to(dtype)
    meddled(block.get_submodule(where), how)
    if how != "parametrization":
        layer = twin.get_submodule(where)
        layer.weight.data.mul_(2)
        if layer.bias is not None and how != "pre-hook":
            layer.bias.data.mul_(2)
    assert relative_l2(block(x, (3, 4)), twin(x, (3, 4))) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "spec", [BlockSpec(8, 3), BlockSpec(8, 11, gate="sigmoid", merge="sum", pooling="bilinear")], ids=str
)
def test_compiles_to_one_graph(spec, grad):
    """With the backend that captures the graph as "eager" does, and its gradients too."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    block, x = DeltaConvBlock(spec), torch.randn(2, 35, 8)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(grad):
        for size in ((7, 5), (5, 7), (1, 35)):
            torch.testing.assert_close(compiled(x, size), block(x, size))


def test_triton_is_asked_at_the_time_of_compiling(triton):
    torch._dynamo.reset()
    triton(SimpleNamespace(BACKEND=Other()))
    block, x = DeltaConvBlock(BlockSpec(8, 3)), torch.randn(2, 35, 8)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    with choose.forced("triton"):
        torch.testing.assert_close(compiled(x, (7, 5)), block(x, (7, 5)))


def test_the_variable_of_the_environment():
    code = (
        "import torch; from deltaconv_core.block.ops.choose import backend_for; "
        "print(backend_for(torch.zeros(1)).name)"
    )
    environment = {**os.environ, "DELTACONV_BACKEND": "reference"}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert output.stdout.split() == [b"reference"]


def test_no_host_synchronization():
    """Nothing asks for a number: what would on a GPU wait for it."""
    seen = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(function)
            return function(*args, **(kwargs or {}))

    with Watch(), torch.no_grad():
        for spec in (BlockSpec(8, 3), BlockSpec(8, 13, (1.0, 0.5, 0.25), "sigmoid", "sum", "bilinear", True)):
            DeltaConvBlock(spec, dtype=torch.bfloat16)(torch.randn(2, 35, 8).bfloat16(), (7, 5))
            ops.half_product(torch.randn(2, 3, 4), torch.randn(5, 4).half())
    assert seen and not seen & {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


def test_float16_gate_factor():
    """The largest products of float16 halves, by hand."""
    v = torch.full((1, 640, 1, 1), 6e4, dtype=torch.float16)
    assert ops.gate(v, "simple")[0, 0].item() == pytest.approx(6e4**2 * math.sqrt(320), rel=1e-6)
