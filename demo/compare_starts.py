"""Warm start against random start: ``python -m demo.compare_starts --output runs/starts``.

Layer-wise distillation of the demo teacher from both starts, on the same batches. Prints, for each seed,
the feature loss that the random start has at the end, and the step at which the warm start has reached it;
writes every step's loss to ``starts.csv``. Losses are means over the last steps, because batches differ.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from tqdm import tqdm

from deltaconv_core.distill import Settings, distill

from .files import teacher_file
from .train_student import Teacher, make_blocks

WINDOW = 50


def run(teacher: Teacher, start: str, seed: int, args: argparse.Namespace) -> list[float]:
    """The feature loss of every step."""
    blocks = make_blocks(teacher, seed, start)
    settings = Settings(
        layer_steps=args.steps, output_steps=0, learning_rate=args.lr, decay=0, ema=0, seed=seed
    )
    with tqdm(total=args.steps, desc=f"{start} start, seed {seed}", mininterval=10) as bar:
        batches = teacher.batches(args.batch_size, seed)
        result = distill(
            teacher.network, blocks, batches, settings, on_step=lambda row: bar.update() and None
        )
    return [row.losses["feature"] for row in result.rows]


def smooth(losses: list[float]) -> list[float]:
    """Each the mean of the WINDOW losses up to there, from the first full window on."""
    return [sum(losses[i - WINDOW : i]) / WINDOW for i in range(WINDOW, len(losses) + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", type=Path, default=teacher_file(), help="the teacher's safetensors file")
    parser.add_argument("--output", type=Path, required=True, help="folder for starts.csv")
    parser.add_argument("--steps", type=int, default=1000, help="steps from each start (default 1000)")
    parser.add_argument("--batch-size", type=int, default=4, help="pictures per step (default 4)")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of AdamW (default 2e-3)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    args = parser.parse_args()
    teacher = Teacher(args.teacher)
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "starts.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["seed", "start", "step", "feature"])
        print(f"| seed | random after {args.steps} steps | warm reaches it after | warm after {args.steps} |")
        print("|---|---|---|---|")
        for seed in args.seeds:
            losses = {start: run(teacher, start, seed, args) for start in ("warm", "random")}
            for start, values in losses.items():
                writer.writerows([seed, start, step, value] for step, value in enumerate(values, 1))
            file.flush()
            warm, random = smooth(losses["warm"]), smooth(losses["random"])
            reached = [step for step, value in enumerate(warm, WINDOW) if value <= random[-1]]
            first = f"{reached[0]} steps" if reached else "not reached"
            print(f"| {seed} | {random[-1]:.4f} | {first} | {warm[-1]:.4f} |", flush=True)


if __name__ == "__main__":
    main()
