"""What a block costs the CPU of a machine with a GPU."""

from __future__ import annotations

import importlib.util
import json
import os

import pytest

from benchmarks import host_time

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="kernels are interpreted"),
]


def test_it_runs_without_a_gpu(tmp_path, capsys):
    file = tmp_path / "host.json"
    assert host_time.main(["--repeats", "1", "--kernel-size", "3", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    figures = json.loads(file.read_text())
    assert all(name in printed for name in figures["steps"])
    assert 0 < figures["steps"]["Triton's launches"] < figures["us"]
    assert f"{figures['launches']} launches of Triton's" in printed and figures["launches"] >= 5
    assert "addmm" in figures["operations"]
