"""Starts of ΔConvBlocks beside each other: ``python -m demo.study.compare_starts --output runs/starts``.

Layer-wise distillation of the demo teacher from three starts, on the same batches, at each learning rate:
random weights, `warm_start`, and the same with its last layers solved (`ridge_start`). Every EVERY steps the
feature loss is measured on pictures that training never sees. Prints, for each seed, the loss that the random
start has at the end, the step at which the others have reached it, and their losses at the start and at the
end; writes all losses to ``starts.csv``.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from tqdm import tqdm

from deltaconv_core import DeltaConvBlock
from deltaconv_core.distill import Row, Settings, distill, tapped
from deltaconv_core.distill.losses import mean_square

from ..files import teacher_file
from .device import add_device, use_device
from .train_student import Teacher, make_blocks

SOLVED = ("warm", "ridge")
EVERY = 25
HELD_OUT_SEED, HELD_OUT_BATCHES, HELD_OUT_SIZE = 1000, 8, 16


class HeldOut:
    """Inputs and outputs of the teacher's attention for batches that no training draws."""

    def __init__(self, teacher: Teacher, blocks: dict[str, DeltaConvBlock]) -> None:
        self.calls: list[tuple[str, torch.Tensor, tuple[int, int], torch.Tensor]] = []
        batches = teacher.batches(HELD_OUT_SIZE, HELD_OUT_SEED)
        network = teacher.network
        with (
            torch.no_grad(),
            tapped(network.attentions, blocks, network.grids) as taps,
            taps.mode(mixing=False, observe=lambda *call: self.calls.append(call)),
        ):
            for number in range(HELD_OUT_BATCHES):
                network(batches(number))

    @torch.no_grad()
    def loss(self, blocks: dict[str, DeltaConvBlock]) -> float:
        """The feature loss: mean squared errors, summed over the sites."""
        errors = [mean_square(blocks[site](x, grid=grid), y) for site, x, grid, y in self.calls]
        return float(sum(errors)) / HELD_OUT_BATCHES


def run(
    teacher: Teacher, blocks: dict[str, DeltaConvBlock], settings: Settings, batch_size: int, title: str
) -> dict[int, float]:
    """Trains the blocks; step -> the loss on the held-out batches."""
    held_out = HeldOut(teacher, blocks)
    losses = {0: held_out.loss(blocks)}
    with tqdm(total=settings.steps, desc=title, mininterval=10) as bar:

        def on_step(row: Row) -> None:
            bar.update()
            if row.step % EVERY == 0:
                losses[row.step] = held_out.loss(blocks)

        distill(
            teacher.network, blocks, teacher.batches(batch_size, settings.seed), settings, on_step=on_step
        )
    return losses


def layer_wise(steps: int, learning_rate: float, seed: int) -> Settings:
    """The first phase alone, at a constant rate and without an average."""
    return Settings(layer_steps=steps, output_steps=0, learning_rate=learning_rate, decay=0, ema=0, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", type=Path, default=teacher_file(), help="the teacher's safetensors file")
    parser.add_argument("--output", type=Path, required=True, help="folder for starts.csv")
    parser.add_argument("--steps", type=int, default=1000, help="steps from each start (default 1000)")
    parser.add_argument("--batch-size", type=int, default=4, help="pictures per step (default 4)")
    parser.add_argument(
        "--lr", type=float, nargs="+", default=[3e-4], help="learning rates of AdamW (default 3e-4)"
    )
    parser.add_argument("--form", choices=("lean", "released"), default="lean", help="default lean")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    add_device(parser)
    args = parser.parse_args()
    use_device(args.device)
    teacher = Teacher(args.teacher)
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "starts.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["learning rate", "seed", "start", "step", "feature"])
        names = [f"{name} {what}" for name in SOLVED for what in ("reaches it after", "at 0", "at the end")]
        print(f"| rate | seed | random after {args.steps} | {' | '.join(names)} |")
        print("|---" * (3 + len(names)) + "|")
        for rate in args.lr:
            for seed in args.seeds:
                losses = {}
                for start in (*SOLVED, "random"):
                    blocks = make_blocks(teacher, seed, start, args.form)
                    settings = layer_wise(args.steps, rate, seed)
                    title = f"{start}, seed {seed}, {rate}"
                    losses[start] = run(teacher, blocks, settings, args.batch_size, title)
                for start, values in losses.items():
                    writer.writerows([rate, seed, start, *item] for item in values.items())
                file.flush()
                goal, cells = losses["random"][args.steps], []
                for start in SOLVED:
                    own = losses[start]
                    reached = next((f"{step} steps" for step, loss in own.items() if loss <= goal), "not")
                    cells += [reached, f"{own[0]:.4f}", f"{own[args.steps]:.4f}"]
                print(f"| {rate} | {seed} | {goal:.4f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
