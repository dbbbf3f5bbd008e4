"""The kernel for tensor cores: run on a CPU in an emulation, and what happens around it without a GPU."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deltaconv_core.block.ops.cuda import build
from deltaconv_core.block.ops.cuda import launcher as kernels
from deltaconv_core.block.reference import depthwise, gated

EMULATOR = Path(__file__).with_name("emulate.cpp")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
PLACES = ctypes.POINTER(ctypes.c_uint16)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """A function like `depthwise_gate`, which runs kernel.cu on the CPU."""
    compiler = shutil.which("g++")
    if compiler is None or sys.platform == "win32":
        pytest.skip("the emulation needs g++ and ucontext.h")
    folder = tmp_path_factory.mktemp("emulated")
    libraries = {}

    def run(u, taps, bias, sigmoid, factor, out_dtype, rows):
        defines = kernels.defines_for(u.dtype, out_dtype, taps.shape[3], bias is not None, sigmoid)
        if defines not in libraries:
            path = folder / f"{len(libraries)}.so"
            flags = [f"-D{name}={value}" for name, value in defines] + [f'-DKERNEL="{build.KERNEL_FILE}"']
            command = [compiler, "-O1", "-w", "-shared", "-fPIC", "-std=c++17", *flags, EMULATOR, "-o", path]
            subprocess.run(command, check=True)
            libraries[defines] = ctypes.CDLL(str(path))
        batch, channels, *size = u.shape
        numbers = kernels.numbers_for(channels // 2, tuple(size), batch, rows)
        out = torch.full((batch, channels // 2, *size), torch.nan, dtype=out_dtype)
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (u, taps, taps if bias is None else bias, out))
        grid = -(-numbers[-1] // kernels.WARPS)
        assert libraries[defines].launch(grid, *pointers, *numbers, ctypes.c_float(factor)) == 0
        return out

    return run


def truth_of(u, taps, bias, kind):
    u, taps, bias = (None if t is None else t.double() for t in (u, taps, bias))
    return gated(depthwise(u.permute(0, 2, 3, 1), taps, bias), kind).permute(0, 3, 1, 2)


def check(emulated, K, size, kind, dtype, bias=True, out_dtype=torch.float32, rows=8, half=2, batch=1):
    torch.manual_seed(K)
    u = torch.randn(batch, 2 * half, *size).to(dtype)
    taps = (torch.randn(2 * half, 1, K, K) / K).to(dtype)
    offsets = torch.randn(2 * half).to(dtype) if bias else None
    factor = {"simple": half**0.5, "scaled": (2 * half) ** -0.5, "sigmoid": 1.0}[kind]
    out = emulated(u, taps, offsets, kind == "sigmoid", factor, out_dtype, rows)
    error = (out.double() - truth_of(u, taps, offsets, kind)).abs().max() / out.double().abs().max()
    assert error < (1e-6 if out_dtype == torch.float32 else torch.finfo(out_dtype).eps / 2)


@pytest.mark.parametrize("K", kernels.KERNEL_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_of_every_size_and_dtype(emulated, K, dtype):
    check(emulated, K, (9, 22), "simple", DTYPES[dtype], bias=K % 4 == 1)


@pytest.mark.parametrize("kind", ["simple", "sigmoid", "scaled"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_of_16_bits(emulated, kind, dtype):
    check(emulated, 5, (7, 10), kind, DTYPES[dtype], out_dtype=DTYPES[dtype])


@pytest.mark.parametrize(
    ("size", "rows"),
    [*itertools.product([(1, 2), (1, 18), (19, 2), (13, 6), (40, 34)], (1, 8, 16)), ((5, 260), 128)],
    ids=str,
)
def test_any_height_and_even_width(emulated, size, rows):
    check(emulated, 3, size, "simple", torch.float16, rows=rows, half=3, batch=2)


def test_halves_beyond_float16(emulated):
    u = torch.full((1, 4, 2, 2), 300.0, dtype=torch.float16)
    taps = torch.zeros(4, 1, 3, 3, dtype=torch.float16)
    taps[:, :, 1, 1] = 1
    out = emulated(u, taps, None, False, 2.0, torch.float32, 8)
    torch.testing.assert_close(out, torch.full((1, 2, 2, 2), 300.0 * 300 * 2))
