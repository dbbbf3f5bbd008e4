"""Blocks of other shapes beside each other: ``python -m demo.study.compare_blocks``.

Layer-wise distillation of the demo teacher into blocks that differ in one thing or another, on the same
batches from the warm start, with the kernel sizes of ΔConv Distill. Prints for each shape its weights; how
many times fewer operations a layer of the paper's table 1 takes than attention does at 15360 x 8640 pixels
(640 channels, K 9, smaller stages projected before they are enlarged); and the feature loss on pictures that
training never sees, averaged over the seeds.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace

import torch

from deltaconv_core import BlockSpec, DeltaConvBlock
from deltaconv_core.block.flops import block_flops
from deltaconv_core.distill import warm_start

from ..files import teacher_file
from .compare_starts import layer_wise, run
from .train_student import Teacher

TABLE = 11010934.11e9  # operations of attention there, as the paper counts them
GRID = (1080, 1920)
THREE = (1.0, 0.5, 0.25)
SUM = {"merge": "sum", "ratio": 0.25}
SHAPES = {
    "released": {},
    "sum": {"merge": "sum"},
    "sum, ratio 1/4": SUM,
    "ratio 1/4": {"ratio": 0.25},
    "ratio 1/4, three scales": {"ratio": 0.25, "scales": THREE},
    "sum, ratio 5/16, three scales": {"merge": "sum", "ratio": 0.3125, "scales": THREE},
    "ratio 1/4, sigmoid": {"ratio": 0.25, "gate": "sigmoid"},
    "ratio 1/4, context": {"ratio": 0.25, "context": True},
    "sum, ratio 1/4, context, one scale": {**SUM, "context": True, "scales": (1.0,)},
    "sum, ratio 1/4, context, three scales": {**SUM, "context": True, "scales": THREE},
    "sum, ratio 1/4, context": {**SUM, "context": True},
}
"""Of the demo's 64 and 128 channels, a quarter is what `BlockSpec.lean` takes, so the last one is lean."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300, help="of each shape (default 300)")
    parser.add_argument("--batch-size", type=int, default=4, help="pictures per step (default 4)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of AdamW (default 1e-3)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default 0")
    args = parser.parse_args()
    teacher = Teacher(teacher_file())
    print("| blocks | weights | attention / block | feature loss |\n|---|---|---|---|")
    for name, shape in SHAPES.items():
        losses = []
        for seed in args.seeds:
            blocks = make(teacher, shape, seed)
            settings = layer_wise(args.steps, args.lr, seed)
            losses.append(run(teacher, blocks, settings, args.batch_size, name)[args.steps])
        weights = sum(block.spec.num_parameters for block in blocks.values())
        fewer = TABLE / block_flops(BlockSpec(640, 9, **shape), GRID, early=True)
        print(f"| {name} | {weights:,} | {fewer:,.0f} | {statistics.mean(losses):.4f} |", flush=True)


def make(teacher: Teacher, shape: dict[str, object], seed: int) -> dict[str, DeltaConvBlock]:
    """Blocks of one shape at every site."""
    torch.manual_seed(seed)
    blocks = {}
    for id, told in teacher.block_specs(teacher.found.shape, teacher.sites, "auto", "released").items():
        spec = replace(BlockSpec.from_dict(told.to_dict()), **shape)
        blocks[id] = DeltaConvBlock(spec)
        warm_start(blocks[id], teacher.network.attentions[id])
    return blocks


if __name__ == "__main__":
    main()
