"""Every student of a teacher, trained and measured: ``python -m demo.study.compare_students --output runs``.

Trains the students of STUDENTS one after the other with the same number of steps, and measures them with
`evaluate.py`: 200 held-out prompts at 48x48, 100 at 96x96, 20 steps. Stopped anywhere, the same command goes
on. Everything lies in a folder named after the teacher's weights, so that students of two teachers do not
mix.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..files import teacher_file
from .device import add_device
from .evaluate import sha256

#: Name -> arguments of `train_student.py`. RECOMMENDED stands for the kernel sizes that `look.py` finds.
RECOMMENDED = "recommended"
STUDENTS: dict[str, list[str]] = {
    "ΔConv": [],
    "released form": ["--form", "released"],
    "linear attention": ["--mixer", "linear", "--lr", "1e-3"],
    "recommended kernel sizes": ["--kernel-sizes", RECOMMENDED],
    "hybrid, untrained": ["--mixer", "hybrid", "--layer-steps", "0", "--output-steps", "0"],
    "hybrid, trained": [
        *("--mixer", "hybrid", "--shape", "Nyström 64, K 5 by channel", "--lr", "1e-3"),
        *("--layer-steps", "400", "--output-steps", "600"),
    ],
    "ridge start": ["--start", "ridge", "--lr", "3e-4"],
    "warm start only": ["--form", "released", "--layer-steps", "0", "--output-steps", "0"],
}


def run(module: str, *arguments: str | Path) -> None:
    """``python -m demo.study.<module>``; ends this program when that fails."""
    command = [sys.executable, "-m", f"demo.study.{module}", *map(str, arguments)]
    print("==>", *command[1:], flush=True)
    if code := subprocess.run(command, check=False).returncode:
        raise SystemExit(f"error: {module} ended with {code}; the same command continues from here")


def weights_file(folder: Path, arguments: list[str]) -> Path:
    """What `train_student.py` writes there."""
    return folder / ("linear.safetensors" if "linear" in arguments else "deltaconv.safetensors")


def compare(
    teacher: Path, output: Path, layer_steps: int, output_steps: int, device: str = "cpu", jobs: int = 1
) -> Path:
    """Train every student, ``jobs`` of them at a time, and measure them; returns the folder."""
    folder = output / sha256(teacher)[:12]
    advice = folder / "look" / "recommendation.json"
    if not advice.exists():
        run("look", "--teacher", teacher, "--output", advice.parent, "--device", device)
    steps = ["--layer-steps", str(layer_steps), "--output-steps", str(output_steps)]

    def train(name: str) -> None:
        given = [advice.read_text("utf-8") if part == RECOMMENDED else part for part in STUDENTS[name]]
        common = ["--teacher", teacher, "--output", folder / name, "--device", device]
        run("train_student", *common, *steps, *given)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(train, STUDENTS))
    measured = [
        part
        for name, arguments in STUDENTS.items()
        for part in ("--student", f"{name}={weights_file(folder / name, arguments)}")
    ]
    run("evaluate", "--teacher", teacher, "--output", folder / "fidelity", "--device", device, *measured)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--teacher", type=Path, default=teacher_file(), help="the teacher's safetensors file")
    add("--output", type=Path, required=True, help="folder for the students and what was measured")
    add("--layer-steps", type=int, default=400, help="layer-wise steps of each (default 400)")
    add("--output-steps", type=int, default=1100, help="end-to-end steps of each (default 1100)")
    add("--jobs", type=int, default=1, help="students trained at a time (default 1)")
    add_device(parser)
    args = parser.parse_args()
    folder = compare(args.teacher, args.output, args.layer_steps, args.output_steps, args.device, args.jobs)
    print(f"\nTables and pictures: {folder / 'fidelity'}")


if __name__ == "__main__":
    main()
