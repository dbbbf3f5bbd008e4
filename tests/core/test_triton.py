"""The Triton backend: its kernels (in a process of their own), and what it says where it cannot run."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deltaconv_core.ops.triton import BACKEND, backend

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("interpreted", [True, False], ids=["interpreter", "GPU"])
def test_kernels(interpreted):
    """Whether kernels are interpreted is settled when triton is first imported, so not in this process."""
    if not interpreted and BACKEND.why_not(
        torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")
    ):
        pytest.skip("no GPU that triton supports")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    # -p: the package that is tested here is imported there too, before conftest.py shortens the path.
    command = [sys.executable, "-m", "pytest", "-p", "deltaconv_core", "-q", str(HERE / "triton_cases.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]


FLOATS = {"factor", "row_ratio", "col_ratio", "first_rows", "first_cols", "second_rows", "second_cols"}
BUILDS = {
    "depthwise_gate._depthwise": (
        {"u": 16, "weight": 16, "bias": 16, "upstream": 32, "out": 16},
        {"HALF": 80, "K": 5, "STEP": 1, "SIGMOID": True, "HAS_BIAS": True},
    ),
    "depthwise_gate._weight_gradient": ({"u": 16, "gradient": 16, "out": 32}, {"K": 5, "KERNEL_COLS": 8}),
    "pool._pool": ({"source": 16, "out": 16}, {"ADJOINT": True}),
    "enlarge._adjoint": ({"source": 16, "out": 16}, {}),
    "project._project": (
        {"stage": 32, "weight": 16, "bias": 16, "first": 32, "second": 32, "out": 16},
        {"HAS_STAGE": True, "HAS_BIAS": True, "SMALLER": 2, "HALF": True, "LARGEST": 2.0**15, "WIDE": False,
         "FLOAT32": "ieee"},
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="kernels are interpreted")
@pytest.mark.parametrize("target", [("cuda", 80, 32), ("hip", "gfx942", 64)], ids=["A100", "MI300"])
@pytest.mark.parametrize("name", BUILDS)
def test_kernels_compile_without_a_gpu(name, target, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    module, _, kernel = name.partition(".")
    tuner = getattr(importlib.import_module(f"deltaconv_core.ops.triton.{module}"), kernel)
    pointers, constants = BUILDS[name]
    config = tuner.configs[-1]
    constants = {**constants, **config.kwargs}
    signature = {
        argument: "constexpr" if argument in constants
        else f"*fp{pointers[argument]}" if argument in pointers
        else "fp32" if argument in FLOATS
        else "i32"
        for argument in tuner.fn.arg_names
    }  # fmt: skip
    # Pointers and numbers of channels are multiples of 16, as those of a model are.
    aligned = [*pointers, "C", "CHANNELS", "weight_stride"]
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (argument, kind) in enumerate(signature.items())
        if argument in aligned and kind != "constexpr"
    }
    source = ASTSource(tuner.fn, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget(*target), options={"num_warps": config.num_warps})
    assert built.metadata.shared <= 64 * 1024  # what every GPU has


def test_a_cpu_is_a_reason():
    assert BACKEND.why_not(torch.zeros(1)) == "x is on a CPU and triton needs a CUDA or ROCm GPU"


def test_a_dtype_is_a_reason():
    assert "float64" in BACKEND.why_not(torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "raise OSError('libcuda.so: cannot open shared object file')",
            r"does not work here \(OSError: libcuda",
        ),
        ("__version__ = '2.3.1'", "triton is 2.3.1 and the kernels need 3.0"),
        ("__version__ = '3.1.0'", r"does not work here \(ModuleNotFoundError: No module named 'triton"),
    ],
    ids=["broken", "old", "half of it"],
)
def test_a_triton_that_does_not_work_is_a_reason(source, reason, tmp_path, monkeypatch):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(source, encoding="utf-8")
    forget_triton(monkeypatch)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert re.search(reason, backend._tried.__wrapped__("cuda", 0))


def test_no_triton_is_a_reason(monkeypatch):
    forget_triton(monkeypatch)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert backend._tried.__wrapped__("cuda", 0) == "triton is not installed"


def forget_triton(monkeypatch):
    """As if nothing had been imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    package = sys.modules[backend.__package__]
    for name in ("tuning", "enlarge", "pool", "depthwise_gate", "project"):
        monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}", raising=False)
        monkeypatch.delattr(package, name, raising=False)
