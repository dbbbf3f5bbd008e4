"""`inspect`: what a checkpoint holds, as a table."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

from torch import Tensor

from ..block import DeltaConvBlock
from ..cli import printable
from ..weights.checkpoint import Checkpoint, load_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the file to read."""
    parser.add_argument("file", metavar="FILE", help="a .safetensors checkpoint, or a folder with one")


def run(options: argparse.Namespace) -> int:
    """Reads the file and prints it."""
    for line in describe(load_checkpoint(options.file)):
        print(printable(line))
    return 0


def describe(checkpoint: Checkpoint) -> list[str]:
    """The lines of the table: architecture, a row per block, totals, base weights, metadata."""
    head = ("site", "channels", "K", "scales", "gate", "merge", "pooling", "dtype", "parameters")
    rows = [head, *(_row(site, block) for site, block in checkpoint.blocks.items())]
    tensors = [tensor for block in checkpoint.blocks.values() for tensor in block.state_dict().values()]
    lines = [f"architecture: {checkpoint.architecture}", *_aligned(rows)]
    lines.append(f"blocks: {len(checkpoint.blocks)}, {_amount(tensors)}")
    base = checkpoint.base_weights
    lines.append(
        f"base weights: {len(base)} tensors, {_amount(base.values())}" if base else "base weights: none"
    )
    return lines + [f"{key}: {value}" for key, value in checkpoint.metadata.items()]


def _row(site: str, block: DeltaConvBlock) -> tuple[str, ...]:
    spec = block.spec
    scales = ", ".join(f"{scale:.4g}" for scale in spec.scales)
    bias = " + bias" if spec.depthwise_bias else ""
    numbers = f"{spec.num_parameters:,}"
    return (
        site, str(spec.dim), f"{spec.kernel_size}{bias}", scales, spec.gate, spec.merge, spec.pooling,
        _dtypes(block.state_dict().values()), numbers,
    )  # fmt: skip


def _dtypes(tensors: Iterable[Tensor]) -> str:
    return "/".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))


def _amount(tensors: Iterable[Tensor]) -> str:
    tensors = list(tensors)
    count = sum(tensor.numel() for tensor in tensors)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return f"{count:,} parameters, {size / 1e6:,.1f} MB"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
