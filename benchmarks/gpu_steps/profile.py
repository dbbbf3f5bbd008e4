"""The step `profile`: what limits the kernels, by Nsight Compute."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
import time
from functools import partial

import torch

from deltaconv_core import bench

from ..gpu import Row
from .run import Run
from .tiles import only, tensor_cores, triton_backend

SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "WarpStateStats", "LaunchStats", "Occupancy")
WANTED = (
    "Duration",
    "Compute (SM) Throughput",
    "Memory Throughput",
    "DRAM Throughput",
    "L1/TEX Cache Throughput",
    "L2 Cache Throughput",
    "Issue Slots Busy",
    "Executed Ipc Active",
    "Registers Per Thread",
    "Achieved Occupancy",
    "SM Frequency",
)


def profile(run: Run) -> None:
    for which in run.pick(("depthwise", "tensor cores", "project"), ("depthwise",)):
        run.case(which, partial(profiled, run, which))


def profiled(run: Run, which: str) -> Row:
    target = [sys.executable, "-m", "benchmarks.gpu_steps", f"once {which}", str(run.output)]
    if run.tiny:
        line = [*target, "--cpu"]
    else:
        sections = [part for section in SECTIONS for part in ("--section", section)]
        names = "regex:depthwise|_project"
        line = ["ncu", "--clock-control", "none", "--csv", "-k", names, "-c", "2", *sections, *target]
    left = max(1.0, run.until - time.time())
    done = subprocess.run(
        line, input=f"{run.until}\n", capture_output=True, text=True, timeout=left, check=False
    )
    if done.returncode:
        raise RuntimeError(f"status {done.returncode}: {(done.stdout + done.stderr)[-500:]}")
    if run.tiny:
        return {"metrics": "no GPU"}
    text = done.stdout[done.stdout.find('"ID"') :]
    row: Row = {}
    for entry in csv.DictReader(io.StringIO(text)):
        kernel, metric = str(entry.get("Kernel Name"))[:24], entry.get("Metric Name")
        if metric in WANTED:
            row[f"{kernel} {metric}"] = f"{entry.get('Metric Value')} {entry.get('Metric Unit')}"
    return row or {"ok": False, "error": f"ncu printed no metrics: {done.stdout[-300:]}"}


def once(which: str, run: Run) -> None:
    """One launch of a kernel at 128² and C 640, for a profiler."""
    side, half, K, dtype = run.pick((128, 160, 9, torch.bfloat16), (6, 16, 3, torch.float32))
    u = torch.randn(2, side, side, 2 * half, device=run.device).to(dtype)
    weight = (torch.randn(2 * half, 1, K, K, device=run.device) / K).to(dtype)
    with only(0):
        if which == "depthwise":
            triton_backend().depthwise_gate(u, weight, None, "simple")
        elif which == "project":
            g = u[..., :half].contiguous()
            matrix = torch.randn(4 * half, half, device=run.device).to(dtype)
            bias = matrix.new_zeros(2, 1, 4 * half)
            triton_backend().project([g], matrix, bias, (side, side), "concat")
        else:
            call = tensor_cores(u.permute(0, 3, 1, 2).contiguous(), weight)
            if isinstance(call, str):
                raise RuntimeError(call)
            call()
    bench.synchronize(run.device)
