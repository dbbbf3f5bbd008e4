"""Every speed benchmark on this machine, one after another, into benchmarks/results.

    python -m benchmarks.run_all [--device cuda] [--dtype float16] [--small] [--folder DIR] [--show]

Files are named by benchmark, device and dtype. Rows that are in them are not measured again, so this can be
stopped at any time and restarted; delete a file to measure again. --show prints the commands and runs none.
Afterwards, `python -m scripts.speed_tables` puts the figures into docs/speed.md. Kernels and whole networks
on a GPU are measured by `benchmarks.gpu`.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import torch

from deltaconv_core import bench

from .harness import RESULTS, parser, result_file

REPOSITORY = Path(__file__).parents[1]
MODELS = ("sd15-1024", "sdxl-1024", "pixart_sigma-1024")
ON_CPU = {
    "network": "--architecture sd15 --size 512 768 1024",
    "network of others": "--architecture sdxl pixart_sigma --size 512 1024",
    "block": "--preset sd15-512 sd15-768 sd15-1024 --repeats 5",
    "paper": "--patience 30",
}
ON_GPU = {
    "block": "--preset kernel sd15-1024 sdxl-1024 pixart_sigma-1024 paper --repeats 20 --patience 20",
    "block backward": "--preset kernel --backward --repeats 20",
}
MODULES = {
    "network": "benchmarks.network",
    "network of others": "benchmarks.network",
    "block": "benchmarks.block",
    "block backward": "benchmarks.block",
    "paper": "benchmarks.paper_tables",
}


def main() -> int:
    command = parser(__doc__)
    command.add_argument("--device", help="such as cuda or cpu (default: cuda where there is one)")
    command.add_argument("--dtype", choices=bench.DTYPES, help="default: float32 on a CPU, else float16")
    command.add_argument("--only", nargs="+", choices=MODULES, default=list(MODULES), metavar="BENCHMARK")
    command.add_argument("--small", action="store_true", help="tiny sizes, to see that it works")
    command.add_argument("--folder", type=Path, default=RESULTS, help="for the results (%(default)s)")
    command.add_argument("--show", action="store_true", help="print the commands")
    args = command.parse_args()
    device = bench.pick_device(args.device)
    dtype = bench.pick_dtype(args.dtype, device)
    failed = []
    for line in commands(device, dtype, args.only, args.small, args.folder):
        print(f"\n==> {shlex.join(line)}", flush=True)
        if not args.show and subprocess.run([sys.executable, *line], cwd=REPOSITORY, check=False).returncode:
            failed.append(shlex.join(line))
    for one in failed:
        print(f"failed: {one}")
    return int(bool(failed))


def commands(
    device: torch.device, dtype: torch.dtype, only: list[str], small: bool, folder: Path
) -> list[list[str]]:
    """What to run, without Python itself."""
    name = str(dtype).removeprefix("torch.")
    common = ["--device", str(device), "--dtype", name, *(["--small", "--repeats", "1"] if small else [])]
    wanted = ON_CPU if device.type == "cpu" else ON_GPU
    lines = []
    for kind in only:
        if kind in wanted:
            file = result_file(folder, kind, device, dtype)
            lines.append(["-m", MODULES[kind], *wanted[kind].split(), *common, "--json", str(file)])
    return lines


if __name__ == "__main__":
    sys.exit(main())
