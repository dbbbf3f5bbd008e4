"""The step `machine`: the GPU, versions, how fast it copies, multiplies and launches."""

from __future__ import annotations

import platform
import subprocess
from functools import partial
from importlib import import_module

import torch

from deltaconv_core import bench

from ..gpu import Row
from .run import DTYPES, NAMES, Run, each, elapsed, graphed, host_ms


def machine(run: Run) -> None:
    device = run.device
    run.case("versions", lambda: versions(run))
    run.case("copies", lambda: {"GB_s": bench.copy_bandwidth(device) / 1e9})
    for dtype in run.pick(DTYPES, (torch.float32,)):
        run.case(f"products {NAMES[dtype]}", partial(products, run, dtype))
    run.case("launch", lambda: launches(run))
    run.case("clocks under load", lambda: loaded(run))


def versions(run: Run) -> Row:
    row: Row = bench.describe(run.device) | {"python": platform.python_version()}
    for name in ("triton", "diffusers", "numpy"):
        try:
            row[name] = import_module(name).__version__
        except Exception as error:
            row[name] = f"{type(error).__name__}"
    if not run.tiny:
        properties = torch.cuda.get_device_properties(0)
        row |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        row |= {"multiprocessors": properties.multi_processor_count, "bytes": properties.total_memory}
        row["driver"] = smi("name,driver_version,clocks.max.sm,power.limit")
    return row


def smi(what: str) -> str:
    try:
        line = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
        return subprocess.run(line, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


def products(run: Run, dtype: torch.dtype) -> Row:
    """float32 as tf32."""
    torch.set_float32_matmul_precision("high")
    return {"TFLOP_s": bench.matmul_rate(run.device, dtype) / 1e12}


def launches(run: Run) -> Row:
    from deltaconv_core.block.ops.triton.tuning import nothing

    x = torch.zeros(16, device=run.device)
    row = {"torch_host_us": 1000 * host_ms(lambda: x.add_(1), run.device, 1000)}
    if not run.tiny:
        row["triton_host_us"] = 1000 * host_ms(lambda: nothing[(1,)](), run.device, 1000)
        many = graphed(each([lambda: nothing[(1,)]()] * 200), run.device)
        row["in_graph_us"] = 1000 * elapsed(many, run.device, 10) / 200
    return row


def loaded(run: Run) -> Row:
    if run.tiny:
        return {"clocks": "no GPU"}
    a = torch.randn(8192, 8192, device=run.device, dtype=torch.bfloat16)
    b = a @ a
    for _ in range(600):  # about a second
        torch.mm(a, a, out=b)
    row = {"clocks": smi("clocks.sm,clocks.mem,power.draw,temperature.gpu")}
    torch.cuda.synchronize()
    return row
