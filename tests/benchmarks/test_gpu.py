"""The script for a machine with a GPU: all of it at tiny sizes, and what it does when something fails."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu_steps.run import Run

REPOSITORY = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def started(output, *arguments):
    command = [sys.executable, "-m", "benchmarks.gpu", "--output", str(output), "--cpu", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def rows_of(path):
    return [row for row in gpu.read(path) if row["case"] != "step"]


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_step_runs_at_tiny_sizes(tmp_path):
    output = tmp_path / "gpu.jsonl"
    done = started(output)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(output)
    assert {row["step"] for row in rows} == set(gpu.LIMITS) and all(row["ok"] for row in rows)
    assert {"check", "kernels", "models"} <= {row["step"] for row in rows if "why_not" not in row}
    assert len(done.stdout) < 12_000
    assert all(f"== {step}:" in done.stdout for step in gpu.LIMITS)


def test_cases_that_are_in_the_file_are_not_run_again(tmp_path):
    output = tmp_path / "gpu.jsonl"
    gpu.append(output, {"step": "large-model", "case": "sd15 8x12 ΔConv", "ok": True, "s": 1.0, "seconds": 1})
    done = started(output, "--steps", "large-model")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["case"] for row in rows_of(output)] == ["sd15 8x12 ΔConv", "sd15 8x12 attn1 off"]


def test_steps_end_with_the_time(tmp_path):
    begun = time.time()
    done = started(tmp_path / "gpu.jsonl", "--steps", "check", "training", "--seconds", "5")
    assert time.time() - begun < 30
    assert done.returncode == 0 and done.stdout.count("time is up") == 2


def test_the_table_of_a_file_is_shown_without_measuring():
    done = started(REPOSITORY / "benchmarks" / "results" / "gpu_h100.jsonl", "--show")
    assert done.returncode == 0 and "== check: 216 rows" in done.stdout and "162 of 162 right" in done.stdout


def test_a_torn_line_is_no_row(tmp_path):
    output = tmp_path / "gpu.jsonl"
    gpu.append(output, {"step": "check", "case": "one", "ok": True})
    with output.open("a", encoding="utf-8") as file:
        file.write('{"step": "check", "ca')
    assert [row["case"] for row in gpu.read(output)] == ["one"]


def test_an_error_is_a_row_and_the_next_case_runs(tmp_path):
    run = Run("check", tmp_path / "gpu.jsonl", time.time() + 60, cpu=True)
    run.case("wrong", lambda: {"ok": False, "error_l2": 1.0})
    run.case("failed", lambda: {"x": 1 / 0})
    run.case("right", lambda: {"x": 1})
    rows = gpu.read(run.output)
    assert [row["ok"] for row in rows] == [False, False, True]
    assert "ZeroDivisionError" in rows[1]["error"]
    text = "\n".join(gpu.table(rows))
    assert "2 of 3 wrong or failed" in text and "ZeroDivisionError" in text


def test_a_graph_that_is_not_captured_ends_the_process_after_its_row(tmp_path):
    """What follows in the same process could not be trusted."""
    output = tmp_path / "gpu.jsonl"
    code = (
        "import sys, time; from pathlib import Path\n"
        "from benchmarks.gpu_steps.run import NotCaptured, Run\n"
        "def fails(): raise NotCaptured('no')\n"
        "run = Run('kernels', Path(sys.argv[1]), time.time() + 60, cpu=True)\n"
        "run.case('one', fails); run.case('two', dict)"
    )
    status = subprocess.run([sys.executable, "-c", code, str(output)], cwd=REPOSITORY, check=False).returncode
    assert status == gpu.GPU_FAULT
    assert [(row["case"], "no" in row["error"]) for row in gpu.read(output)] == [("one", True)]


def test_the_long_list_of_kernels_stands_after_what_it_is_for():
    steps = ["kernels", "models", "blocks", "machine"]
    rows = [{"step": step, "case": "one", "ok": True, "seconds": 0.1} for step in steps]
    titles = [line.split()[1] for line in gpu.table(rows) if line.startswith("\n== ")]
    assert titles[1:] == ["machine:", "blocks:", "models:", "kernels:"]


def test_the_table_takes_the_fastest_of_each_family():
    def row(how, cold):
        case = {"step": "kernels", "case": how, "ok": True, "about": "depthwise", "how": how}
        return case | {"cold_us": cold, "warm_us": cold / 2, "bound_us": 2.0, "seconds": 0.1}

    rows = [row("4/64/32/2 8w", 40.0), row("4/32/32/2 8w", 30.0), row("tensor cores R16", 8.0)]
    (line,) = [text for text in gpu.table(rows) if text.startswith("depthwise")]
    assert "4/32/32/2 8w 30.0/15.0 (15.0x)" in line and "tensor cores R16 8.0/4.0 (4.0x)" in line
    assert "40.0" not in line
