"""The Triton backend: its kernels (in a process of their own), and what it says where it cannot run."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import logging
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from deltaconv_core.block.ops.by_reference import ReferenceBackend
from deltaconv_core.block.ops.triton import BACKEND, by_triton
from testing.machine_code import build

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
    command = [sys.executable, "-m", "pytest", "-q", str(HERE / "triton_cases.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]


PROJECT = {"HAS_STAGE": True, "HAS_BIAS": True, "SMALLER": 2, "HALF": False, "LARGEST": 2.0**15}
PROJECT |= {"WIDE": False, "TF32": False, "FLOAT32": "ieee", "PLANES": False}
PROJECTED = ("stage", "weight", "bias", "first", "second", "out")
FLOAT16 = dict(zip(PROJECTED, ("fp32", "fp16", "fp16", "fp32", "fp32", "fp16"), strict=True))
BUILDS = {
    "depthwise_gate._depthwise": (
        {"u": "fp16", "weight": "fp16", "bias": "fp16", "upstream": "fp32", "out": "fp16"},
        {"HALF": 80, "K": 5, "STEP": 1, "SIGMOID": True, "HAS_BIAS": True},
    ),
    "depthwise_gate._weight_gradient": (
        {"u": "fp16", "gradient": "fp16", "out": "fp32"},
        {"K": 5, "KERNEL_COLS": 8},
    ),
    "pool._pool": ({"source": "fp16", "out": "fp16"}, {"ADJOINT": True}),
    "enlarge._adjoint": ({"source": "fp16", "out": "fp16"}, {}),
    "project._project float16 by rows": (FLOAT16, PROJECT | {"HALF": True}),
    "project._project float16 by tf32": (FLOAT16, PROJECT | {"TF32": True, "FLOAT32": "tf32"}),
    "project._project bfloat16": (dict.fromkeys(PROJECTED, "bf16"), PROJECT),
    "project._project planes": (dict.fromkeys(PROJECTED, "bf16"), PROJECT | {"PLANES": True}),
    "project._project float16 planes": (FLOAT16, PROJECT | {"TF32": True, "FLOAT32": "tf32", "PLANES": True}),
    "project._project float32": (dict.fromkeys(PROJECTED, "fp32"), PROJECT),
}


@pytest.mark.slow
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="kernels are interpreted")
@pytest.mark.parametrize(
    "target", [("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)], ids=["A100", "H100", "MI300"]
)
@pytest.mark.parametrize("name", BUILDS)
def test_kernels_compile_without_a_gpu(name, target, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    module, kernel = name.split()[0].split(".")
    tuner = getattr(importlib.import_module(f"deltaconv_core.block.ops.triton.{module}"), kernel).tuner
    for config in {tuner.configs[0], tuner.configs[-1]}:  # the first is taken where nothing can be measured
        built = build(tuner, config, *BUILDS[name], target)
        assert built.metadata.shared <= 64 * 1024  # what every GPU has


class Kernel:
    """Stands for a compiled kernel; its launches are kept."""

    arg_names = ("tensor", "x")

    def __init__(self):
        self.fn, self.launches = (lambda tensor, x: None), []

    def __getitem__(self, grid):
        return functools.partial(self.run, grid=grid)

    def run(self, *arguments, **options):
        self.launches.append(options["ROWS"])


@pytest.fixture
def tuning(monkeypatch):
    pytest.importorskip("triton")
    tuning = importlib.import_module("deltaconv_core.block.ops.triton.tuning")
    monkeypatch.setattr(tuning, "INTERPRETED", False)
    importlib.import_module("deltaconv_core.block.ops.triton.launch").say.reset()
    options = {"do_bench": tuning.autotuner_options()["do_bench"]}  # and nothing on disk
    monkeypatch.setattr(tuning, "autotuner_options", lambda: options)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning.triton.testing, "do_bench", lambda launch, **_: [next(tuning.times)] * 3)
    tuning.times = iter((2.0, 1.0, 3.0))
    return tuning


CONFIGS = [({"ROWS": rows}, 4) for rows in (1, 2, 3)]


def launcher(tuning, kernel):
    """Launches a kernel with an argument by way of what `tuned` makes of it."""
    from deltaconv_core.block.ops.triton.launch import LaunchArguments

    tuned = tuning.tuned(CONFIGS, {}, key=["x"])(kernel)
    return lambda x: tuned.launch(x, [torch.zeros(1)], lambda: LaunchArguments(lambda tiles: (1,), (x,), {}))


def test_tile_sizes_are_chosen_once(tuning, caplog):
    kernel = Kernel()
    launch = launcher(tuning, kernel)
    with caplog.at_level(logging.INFO):
        launch(5)
        launch(5)
    assert kernel.launches == [2, 2]
    assert [record.message for record in caplog.records if "compiles its kernels" in record.message]
    assert len(caplog.records) == 1


def test_tile_sizes_are_remembered_by_the_name_of_the_gpu(tuning, monkeypatch):
    names = ["NVIDIA H100", "NVIDIA H200", "NVIDIA H100"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])
    numbers = [tuning.number_of_gpu.__wrapped__(torch.device("cuda", i)) for i in range(3)]
    assert numbers[0] == numbers[2] != numbers[1] and max(numbers) < 2**31
    gradient = importlib.import_module("deltaconv_core.block.ops.triton.depthwise_gate")._weight_gradient
    assert "GPU" in gradient.tuner.keys


def test_it_is_told_which_kernel_took_how_long_to_compile(tuning, monkeypatch, caplog):
    launch = importlib.import_module("deltaconv_core.block.ops.triton.launch")
    clock = itertools.count(0, 7)
    monkeypatch.setattr(launch.time, "perf_counter", lambda: next(clock))
    kernel = Kernel()
    kernel.__name__ = "_depthwise"
    start = launcher(tuning, kernel)
    with caplog.at_level(logging.INFO):
        start(5)
        start(5)
    told = [record.message for record in caplog.records if "compiled in" in record.message]
    assert len(told) == 1 and re.fullmatch(r"ΔConv: depthwise compiled in \d+ s", told[0])


def out_of_memory(*_, **__):
    raise torch.cuda.OutOfMemoryError("256 MiB")


@pytest.mark.parametrize(
    ("place", "stand_in"),
    [
        ("torch.cuda.is_current_stream_capturing", lambda: True),
        ("triton.testing.do_bench", out_of_memory),
    ],
    ids=["capture", "out of memory"],
)
def test_where_nothing_can_be_measured_the_first_tile_size_is_taken(tuning, monkeypatch, place, stand_in):
    kernel = Kernel()
    launch = launcher(tuning, kernel)
    with monkeypatch.context() as patch:
        patch.setattr(place, stand_in)
        launch(5)
    launch(5)
    assert kernel.launches == [1, 2]


def test_two_threads_may_meet_new_shapes_at_once(tuning, monkeypatch):
    kernel = Kernel()
    tuning.times = itertools.cycle((2.0, 1.0, 3.0))
    monkeypatch.setattr(
        tuning.triton.testing, "do_bench", lambda launch, **_: time.sleep(0.001) or [next(tuning.times)] * 3
    )
    launch = launcher(tuning, kernel)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(launch, range(16)))
    assert kernel.launches == [2] * 16


def test_the_largest_kernels_are_pytorchs():
    u, weight = torch.randn(1, 3, 4, 2), torch.randn(2, 1, 33, 33)
    expected = ReferenceBackend().depthwise_gate(u, weight, None, "simple")
    torch.testing.assert_close(BACKEND.depthwise_gate(u, weight, None, "simple"), expected)


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
    assert re.search(reason, by_triton.try_triton("cuda", 0))


def test_no_triton_is_a_reason(monkeypatch):
    forget_triton(monkeypatch)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert by_triton.try_triton("cuda", 0) == "triton is not installed"


def forget_triton(monkeypatch):
    """As if nothing had been imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    package = sys.modules[by_triton.__package__]
    for name in ("tuning", "enlarge", "pool", "depthwise_gate", "project"):
        monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}", raising=False)
        monkeypatch.delattr(package, name, raising=False)
