"""The Triton backend: its kernels (in a process of their own), and what it says where it cannot run."""

from __future__ import annotations

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
    if not interpreted and BACKEND.why_not(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")):
        pytest.skip("no GPU that triton supports")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", str(HERE / "triton_cases.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]


def test_a_cpu_is_a_reason():
    assert BACKEND.why_not(torch.zeros(1)) == "x is on a CPU and triton needs a CUDA or ROCm GPU"


def test_a_dtype_is_a_reason():
    assert "float64" in BACKEND.why_not(torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise OSError('libcuda.so: cannot open shared object file')", r"does not work here \(OSError: libcuda"),
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
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
