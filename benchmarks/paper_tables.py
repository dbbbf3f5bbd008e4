"""The paper's tables 1 and 2, with our figures beside theirs.

    python -m benchmarks.paper_tables [--table 1 2] [--json FILE]

Table 1: floating point operations of one self-attention layer with 640 channels at every latent position of a
picture; ΔConv with K 9. Nothing is run, so any machine will do. Lines, after the paper's own:

- attention: as the paper counts it, 4NC² + 4NC + 4N²C: one for each multiply-add of the projections, two for
  each of the two products;
- counted: attention by PyTorch's counter, two for each multiply-add, as in all columns that follow;
- LinFusion: our layer by the counter, which is more than the paper counts;
- step by step: the authors' block as its description says, each step done as written;
- ΔConv: the authors' block as this package computes it by default, which is exactly the same function: what
  is at half size is projected before it is enlarged (where that is slower, it may choose the former);
- lean: the same for the leaner block that new distillations take unless told otherwise.

Table 2: how long one layer of PixArt takes (1152 channels, 16 heads, tokens of 2 x 2 latent positions; ΔConv
with K 13), beside the paper's, whose GPU is not known; so compare ratios. A size whose attention would take
longer than --patience is left out.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deltaconv_core import BlockSpec, DeltaConvBlock, bench
from deltaconv_core.block.flops import block_flops
from deltaconv_core.mixers.linear_attention import LinearAttention
from deltaconv_core.util.text import markdown

from .harness import Results, add_machine, circumstances, parser

META = torch.device("meta")
PAPER = BlockSpec(640, 9)
LEAN = BlockSpec.lean(640, 9)
PIXART = BlockSpec(1152, 13, gate="sigmoid")

# picture -> (width, height) in pixels, and the paper's GFLOP of attention, LinFusion (at 1024 x 1024 from its
# ratio to ΔConv, 5.42; for larger pictures it has none) and ΔConv.
TABLE_1: dict[str, tuple[tuple[int, int], float, float | None, float]] = {
    "512": ((512, 512), 49.67, 17.03, 2.82),
    "1024": ((1024, 1024), 714.08, 5.42 * 12.56, 12.56),
    "4K": ((4096, 2160), 49149.21, None, 105.94),
    "16K": ((15360, 8640), 11010934.11, None, 1589.10),
}
RATIOS = (
    ("attention, paper", "ΔConv, paper"),
    ("attention, paper", "step by step"),
    ("attention, paper", "ΔConv"),
    ("counted", "ΔConv"),
    ("attention, paper", "lean"),
    ("LinFusion, paper", "ΔConv, paper"),
    ("LinFusion, paper", "ΔConv"),
    ("LinFusion", "ΔConv"),
)
# picture -> (width, height), and the paper's milliseconds of attention, LinFusion and ΔConv.
TABLE_2 = {"1024": ((1024, 1024), 5.91, 5.82, 3.53), "4K": ((4096, 2160), 1077.98, 88.59, 54.84)}


def main() -> int:
    command = parser(__doc__)
    command.add_argument("--table", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    command.add_argument("--patience", type=float, default=60, help="seconds for a run (%(default)s)")
    add_machine(command, repeats=7)
    args = command.parse_args()
    device = bench.pick_device(args.device)
    dtype = bench.pick_dtype(args.dtype, device)
    results = Results(args.json, circumstances(device, dtype, args.small))
    if 1 in args.table:
        rows = [
            results.find(table=1, picture=picture)
            or results.add({"table": 1, "picture": picture} | operations(picture))
            for picture in TABLE_1
        ]
        print(f"Table 1: GFLOP of one layer, 640 channels, K 9\n\n{table_1(rows)}\n", flush=True)
    if 2 in args.table:
        rate = bench.matmul_rate(device, dtype)
        rows = [
            results.find(table=2, picture=picture)
            or results.add(
                {"table": 2, "picture": picture, "seconds": times(picture, args, device, dtype, rate)}
            )
            for picture in TABLE_2
        ]
        print(f"Table 2: one layer of PixArt, K 13; in brackets the paper's\n\n{table_2(rows)}", flush=True)
    return 0


def operations(picture: str) -> dict[str, Any]:
    """Floating point operations of one layer, by column."""
    width, height = TABLE_1[picture][0]
    grid = bench.latent_of((width, height))
    n, c = grid[0] * grid[1], PAPER.dim
    return {
        "attention": 4 * n * c**2 + 4 * n * c + 4 * n**2 * c,
        "counted": counted(bench.SelfAttention(c, c // 64, META), PAPER.dim, grid),
        "LinFusion": counted(LinearAttention(c, c // 64).to(META), PAPER.dim, grid),
        "step by step": block_flops(PAPER, grid),
        "ΔConv": counted(DeltaConvBlock(PAPER, META), PAPER.dim, grid),
        "lean": counted(DeltaConvBlock(LEAN, META), LEAN.dim, grid),
    }


def counted(mixer: torch.nn.Module, channels: int, grid: tuple[int, int]) -> int:
    """By PyTorch's counter, for one picture."""
    x = torch.empty(1, grid[0] * grid[1], channels, device=META)
    with torch.inference_mode():
        return bench.count_flops(lambda: mixer(x, grid))


def table_1(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each column of the help, then ratios; a column for each picture."""
    lines: dict[str, list[float | None]] = {
        "attention, paper": [TABLE_1[row["picture"]][1] for row in rows],
        "LinFusion, paper": [TABLE_1[row["picture"]][2] for row in rows],
        "ΔConv, paper": [TABLE_1[row["picture"]][3] for row in rows],
    }
    for name in ("attention", "counted", "LinFusion", "step by step", "ΔConv", "lean"):
        lines[name] = [row[name] / 1e9 for row in rows]
    for one, other in RATIOS:
        pairs = zip(lines[one], lines[other], strict=True)
        lines[f"{one} / {other}"] = [a / b if a and b else None for a, b in pairs]
    pictures = ["{} x {}".format(*TABLE_1[row["picture"]][0]) for row in rows]
    return "\n".join(
        markdown(
            [
                {"GFLOP": name, **dict(zip(pictures, map(giga, numbers), strict=True))}
                for name, numbers in lines.items()
                if any(numbers)
            ]
        )
    )


def giga(number: float | None) -> str:
    return f"{number:,.2f}" if number else ""


def times(picture: str, args: Any, device: torch.device, dtype: torch.dtype, rate: float) -> dict[str, float]:
    """Seconds of one layer by method, of those that --patience allows."""
    height, width = bench.latent_of(TABLE_2[picture][0])
    grid = (8, 8) if args.small else (height // 2, width // 2)
    layer = bench.Layer("", PIXART, 16, grid)
    mixers: dict[str, torch.nn.Module] = {
        "attention": bench.SelfAttention(PIXART.dim, layer.heads, device, dtype),
        "LinFusion": LinearAttention(PIXART.dim, layer.heads).to(device, dtype),
        "ΔConv": DeltaConvBlock(PIXART, device, dtype),
    }
    x = torch.randn(1, grid[0] * grid[1], PIXART.dim, device=device).to(dtype)
    cost = bench.layer_cost(layer, 1, 0, 0)
    if cost.attention_flops / rate > args.patience:
        del mixers["attention"]
    runs: dict[str, Callable[[], Tensor]] = {
        name: lambda mixer=mixer: mixer(x, grid) for name, mixer in mixers.items()
    }
    with torch.inference_mode():
        taken = bench.alternate(runs, device, args.repeats)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def table_2(rows: Sequence[Mapping[str, Any]]) -> str:
    """Milliseconds, and ratios to ΔConv."""
    lines = []
    for row in rows:
        (width, height), *paper = TABLE_2[row["picture"]]
        line = {"picture": f"{width} x {height}"}
        for name, theirs in zip(("attention", "LinFusion", "ΔConv"), paper, strict=True):
            ours = row["seconds"].get(name)
            line[f"{name} ms"] = f"{1000 * ours:,.2f} ({theirs:,.2f})" if ours else f"- ({theirs:,.2f})"
        for name, theirs in zip(("attention", "LinFusion"), paper, strict=False):
            ours = row["seconds"].get(name)
            ratio = f"{ours / row['seconds']['ΔConv']:.2f}" if ours else "-"
            line[f"{name} / ΔConv"] = f"{ratio} ({theirs / paper[2]:.2f})"
        lines.append(line)
    return "\n".join(markdown(lines))


if __name__ == "__main__":
    sys.exit(main())
