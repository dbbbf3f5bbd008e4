"""The kernel for tensor cores: run on a CPU in an emulation, and what happens around it without a GPU."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from deltaconv_core import BlockSpec, DeltaConvBlock, DeltaConvError
from deltaconv_core.block import ops
from deltaconv_core.block.ops import choose
from deltaconv_core.block.ops.cuda import build, by_cuda
from deltaconv_core.block.ops.cuda import launcher as kernels
from deltaconv_core.block.ops.cuda.driver import Driver
from deltaconv_core.block.ops.cuda.nvrtc import CudaError
from deltaconv_core.block.reference import depthwise, gated, reference_block
from testing.compare import relative_l2

EMULATOR = Path(__file__).with_name("emulate.cpp")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def library_for(tmp_path_factory):
    """Macros -> path of a library for the CPU: kernel.cu, and a driver that runs it."""
    compiler = shutil.which("g++")
    if compiler is None or sys.platform == "win32":
        pytest.skip("the emulation needs g++ and ucontext.h")
    folder = tmp_path_factory.mktemp("emulated")
    libraries = {}

    def library_for(defines):
        if defines not in libraries:
            path = folder / f"{len(libraries)}.so"
            flags = [f"-D{name}={value}" for name, value in defines] + [f'-DKERNEL="{build.KERNEL_FILE}"']
            command = [compiler, "-O1", "-w", "-shared", "-fPIC", "-std=c++17", *flags, EMULATOR, "-o", path]
            subprocess.run(command, check=True)
            libraries[defines] = str(path)
        return libraries[defines]

    return library_for


@pytest.fixture
def run(library_for, monkeypatch):
    """`depthwise_gate`, on an emulated GPU: the driver's functions run kernel.cu on the CPU."""

    def function(index, name, defines):
        driver = Driver(library_for(defines))
        builder.driver = lambda: driver
        return driver.load(index, b"cubin", name)

    def poisoned(*arguments, empty=kernels._empty):
        return empty(*arguments).fill_(torch.nan)

    builder = SimpleNamespace(function=function)
    one = SimpleNamespace(multi_processor_count=1)
    monkeypatch.setattr(kernels, "builder", builder)
    monkeypatch.setattr(kernels, "why_not", lambda u, taps: "")
    monkeypatch.setattr(kernels, "_empty", poisoned)
    monkeypatch.setattr(kernels, "_stream", lambda index: 7)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: one)
    kernels._launch.cache_clear()
    yield kernels.depthwise_gate
    kernels._launch.cache_clear()


def truth_of(u, taps, bias, kind):
    u, taps, bias = (None if t is None else t.double() for t in (u, taps, bias))
    return gated(depthwise(u.permute(0, 2, 3, 1), taps, bias), kind).permute(0, 3, 1, 2)


def check(run, K, size, kind, dtype, bias=True, out_dtype=torch.float32, rows=8, half=2, batch=1):
    torch.manual_seed(K)
    u = torch.randn(batch, 2 * half, *size).to(dtype)
    taps = (torch.randn(2 * half, 1, K, K) / K).to(dtype)
    offsets = torch.randn(2 * half).to(dtype) if bias else None
    factor = {"simple": half**0.5, "scaled": (2 * half) ** -0.5, "sigmoid": 1.0}[kind]
    out = run(u, taps, offsets, kind == "sigmoid", factor, out_dtype, rows)
    error = (out.double() - truth_of(u, taps, offsets, kind)).abs().max() / out.double().abs().max()
    assert error < (1e-6 if out_dtype == torch.float32 else torch.finfo(out_dtype).eps / 2)


@pytest.mark.parametrize("K", kernels.KERNEL_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_of_every_size_and_dtype(run, K, dtype):
    check(run, K, (9, 22), "simple", DTYPES[dtype], bias=K % 4 == 1)


@pytest.mark.parametrize("kind", ["simple", "sigmoid", "scaled"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_of_16_bits(run, kind, dtype):
    check(run, 5, (7, 10), kind, DTYPES[dtype], out_dtype=DTYPES[dtype])


@pytest.mark.parametrize(
    ("size", "rows"),
    [*itertools.product([(1, 2), (1, 18), (19, 2), (13, 6), (40, 34)], (1, 8, 16)), ((5, 260), 128)],
    ids=str,
)
def test_any_height_and_even_width(run, size, rows):
    check(run, 3, size, "simple", torch.float16, rows=rows, half=3, batch=2)


def test_halves_beyond_float16(run):
    u = torch.full((1, 4, 2, 2), 300.0, dtype=torch.float16)
    taps = torch.zeros(4, 1, 3, 3, dtype=torch.float16)
    taps[:, :, 1, 1] = 1
    out = run(u, taps, None, False, 2.0, torch.float32, 8)
    torch.testing.assert_close(out, torch.full((1, 2, 2, 2), 300.0 * 300 * 2))


def test_operands_of_any_strides(run):
    u = torch.randn(1, 5, 6, 4).half().permute(0, 3, 1, 2)
    taps = torch.randn(4, 1, 3, 3).half().transpose(2, 3)
    bias = torch.randn(8).half()[::2]
    expected = run(*(t.contiguous() for t in (u, taps, bias)), False, 1.0, torch.float32)
    assert torch.equal(run(u, taps, bias, False, 1.0, torch.float32), expected)
    shifted = torch.zeros(u.numel() + 1).half()[1:].view(1, 4, 5, 6).copy_(u)  # at an odd address
    assert torch.equal(run(shifted, taps, bias, False, 1.0, torch.float32), expected)


@pytest.mark.parametrize(
    "spec",
    [
        BlockSpec(12, 5),
        BlockSpec(12, 3, gate="sigmoid", pooling="bilinear", depthwise_bias=True),
        BlockSpec(12, 3, scales=(1.0, 0.5, 0.25), gate="scaled", merge="sum", context=True),
    ],
    ids=["release", "earlier block", "three scales"],
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", [(7, 10), (5, 12)], ids=str)
def test_whole_block(run, monkeypatch, spec, dtype, grid):
    monkeypatch.setattr(by_cuda, "unsuited", lambda *_: "")
    monkeypatch.setattr(ops, "compute_dtype", lambda x: x.dtype)
    torch.manual_seed(0)
    block = DeltaConvBlock(spec, dtype=DTYPES[dtype])
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, grid[0] * grid[1], spec.dim).to(DTYPES[dtype])
    weights = {name: weight.double() for name, weight in block.state_dict().items()}
    truth = reference_block(x.double(), grid, spec, weights)
    errors = {}
    for name in ("cuda", "torch"):
        with torch.no_grad(), choose.forced(name):
            errors[name] = relative_l2(block(x, grid), truth)
    assert errors["cuda"] < 1.2 * errors["torch"]


@pytest.mark.usefixtures("run")
def test_a_compiled_block(monkeypatch):
    monkeypatch.setattr(by_cuda, "unsuited", lambda *_: "")
    monkeypatch.setattr(ops, "compute_dtype", lambda x: x.dtype)
    torch._dynamo.reset()
    block = DeltaConvBlock(BlockSpec(12, 3), dtype=torch.bfloat16)
    x = torch.randn(1, 40, 12).bfloat16()
    with torch.no_grad(), choose.forced("cuda"):
        y = torch.compile(block, backend="aot_eager", fullgraph=True)(x, (4, 10))
        torch.testing.assert_close(y, block(x, (4, 10)))


@pytest.mark.parametrize("name", ["", "torch", "triton"])
def test_it_runs_only_where_it_is_asked_for(monkeypatch, name):
    monkeypatch.setattr(by_cuda, "unsuited", lambda *_: "")
    monkeypatch.setenv("DELTACONV_BACKEND", name)
    x = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16)
    with torch.no_grad():
        assert ops.planes_backend_for(x, (64, 64), 9) is None
        monkeypatch.setenv("DELTACONV_BACKEND", "cuda")
        assert ops.planes_backend_for(x, (64, 64), 9).name == "cuda"


def test_a_mixer_s_kernels_run_where_it_is_asked_for():
    x = torch.randn(1, 4, 5, 3)
    with choose.forced("cuda"):
        y = ops.backend_for_convolution(x).depthwise(x, torch.ones(3, 1, 1, 1))
    assert torch.equal(x, y)


def test_what_runs_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(by_cuda, "unsuited", lambda *_: "")
    monkeypatch.setattr(by_cuda.TRITON, "why_not", lambda x: "triton is not installed")
    choose.choice.reset()
    with torch.no_grad(), choose.forced("cuda"), caplog.at_level("INFO"):
        for _ in range(2):
            ops.planes_backend_for(torch.zeros(1, 4, 8).half(), (2, 2), 3)
    (record,) = caplog.records
    assert "depth-wise convolutions on tensor cores" in record.message
    assert "the last projection by PyTorch, because triton is not installed" in record.message


def test_gradients_are_a_reason():
    block = DeltaConvBlock(BlockSpec(12, 3))
    with choose.forced("cuda"), pytest.raises(DeltaConvError, match="cuda, but autograd is on"):
        block(torch.randn(1, 4, 12), (2, 2))


@pytest.mark.parametrize(
    ("device", "dtype", "width", "K", "reason"),
    [
        ("cpu", torch.float16, 4, 3, "x is on a CPU"),
        ("cuda", torch.float32, 4, 3, "x is float32"),
        ("cuda", torch.float16, 5, 3, "the grid has 5 columns"),
        ("cuda", torch.float16, 4, 15, "K is 15"),
        ("cuda", torch.float16, 4, 1, "K is 1 "),
    ],
)
def test_reasons(device, dtype, width, K, reason):
    assert kernels.unsuited(torch.device(device), dtype, width, K).startswith(reason)


@pytest.mark.parametrize(
    ("capability", "hip", "reason"),
    [((7, 5), None, "compute capability is 7.5"), ((9, 0), "6.4", "ROCm"), ((9, 0), None, "no driver")],
    ids=["old", "ROCm", "broken"],
)
def test_reasons_of_a_gpu(monkeypatch, capability, hip, reason):
    def broken(*_):
        raise CudaError("no driver")

    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(kernels.builder, "function", broken)
    assert reason in kernels._tried.__wrapped__(0)


def test_what_does_not_fit_is_refused():
    u, taps = torch.zeros(1, 4, 2, 2).half(), torch.zeros(4, 1, 3, 3).half()
    with pytest.raises(DeltaConvError, match=r"expected u \(B, c, H, W\)"):
        kernels.depthwise_gate(u, taps[:2], None, False, 1.0, torch.float32)
    with pytest.raises(DeltaConvError, match="one dtype"):
        kernels.depthwise_gate(u, taps.float(), None, False, 1.0, torch.float32)
    with pytest.raises(DeltaConvError, match="x is on a CPU"):
        kernels.depthwise_gate(u, taps, None, False, 1.0, torch.float32)


def test_a_failure_says_what_to_do(run, monkeypatch):
    monkeypatch.setattr(kernels, "_stream", lambda index: 8)  # which the emulated driver does not know
    u, taps = torch.zeros(1, 4, 2, 2).half(), torch.zeros(4, 1, 3, 3).half()
    with pytest.raises(DeltaConvError, match=r"cuLaunchKernel: as the stub says.*DELTACONV_BACKEND=torch"):
        run(u, taps, None, False, 1.0, torch.float32)


def test_a_cubin_is_kept_and_a_damaged_one_made_again(monkeypatch, tmp_path, caplog):
    def load(index, cubin, name):
        if cubin != b"good":
            raise CudaError("damaged")
        return "function"

    def compile_(source, capability, defines):
        compiled.append(defines)
        return b"good"

    def builder():
        new = build.Builder()
        monkeypatch.setattr(new, "driver", lambda: SimpleNamespace(load=load))
        monkeypatch.setattr(new, "nvrtc", lambda: SimpleNamespace(version="13.0", compile=compile_))
        return new

    compiled = []
    monkeypatch.setenv("DELTACONV_TUNE_CACHE", str(tmp_path / "fastest.json"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    defines = kernels.defines_for(torch.float16, torch.float32, 3, False, False)
    for _ in range(2):
        assert builder().function(0, "depthwise_gate", defines) == "function"
    assert len(compiled) == 1
    (kept,) = (tmp_path / "cubins").iterdir()
    kept.write_bytes(b"bad")
    builder().function(0, "depthwise_gate", defines)
    assert len(compiled) == 2 and kept.read_bytes() == b"good" and "compiled again" in caplog.text
