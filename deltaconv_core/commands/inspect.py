"""`inspect`: what a checkpoint holds, as a table."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from ..block import DeltaConvBlock
from ..cli import printable
from ..mixers.hybrid import HybridMixer
from ..mixers.joint import JointMixer
from ..util.text import aligned
from ..weights.checkpoint import DELTACONV_KIND, HYBRID_KIND, JOINT_KIND, Checkpoint, load_checkpoint

HEAD = ("site", "channels", "K", "scales", "gate", "merge", "pooling", "dtype", "parameters")
HYBRID_HEAD = (
    "site", "channels", "heads", "landmarks", "Nyström", "window", "K", "scales", "share", "mean", "gate",
    "dtype", "parameters",
)  # fmt: skip

JOINT_HEAD = ("site", "channels", "heads", "landmarks", "window", "K", "scales", "dtype", "parameters")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the file to read."""
    parser.add_argument("file", metavar="FILE", help="a .safetensors checkpoint, or a folder with one")


def run(options: argparse.Namespace) -> int:
    """Reads the file and prints it."""
    for line in lines_of(load_checkpoint(options.file)):
        print(printable(line))
    return 0


def lines_of(checkpoint: Checkpoint) -> list[str]:
    """The lines of the table: architecture, a row per block, totals, base weights, metadata."""
    kinds: dict[str, tuple[tuple[str, ...], Callable[[str, Any], tuple[str, ...]]]] = {
        HYBRID_KIND: (HYBRID_HEAD, _hybrid_row),
        JOINT_KIND: (JOINT_HEAD, _joint_row),
    }
    head, row = kinds.get(checkpoint.mixer, (HEAD, _row))
    rows = [head, *(row(site, block) for site, block in checkpoint.blocks.items())]
    tensors = [tensor for block in checkpoint.blocks.values() for tensor in block.state_dict().values()]
    lines = [f"architecture: {checkpoint.architecture}", *aligned(rows)]
    if checkpoint.mixer == DELTACONV_KIND:
        lines.append(f"blocks: {len(checkpoint.blocks)}, {_amount(tensors)}")
    else:
        lines += [f"attention stays at {site}: {reason}" for site, reason in checkpoint.kept.items()]
        lines.append(f"{checkpoint.mixer} mixers: {len(checkpoint.blocks)}, {_amount(tensors)}")
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


def _hybrid_row(site: str, mixer: HybridMixer) -> tuple[str, ...]:
    spec = mixer.spec
    scales = ", ".join(f"{scale:.4g}" for scale in spec.scales) if spec.kernel_size else "–"
    sizes = (spec.landmarks, spec.window, spec.kernel_size)
    marks = ("yes" if flag else "–" for flag in (spec.mean, spec.gate))
    return (
        site, str(spec.dim), str(spec.heads), str(sizes[0] or "–"), spec.nystrom, str(sizes[1] or "–"),
        str(sizes[2] or "–"), scales, spec.share, *marks, _dtypes(mixer.state_dict().values()),
        f"{spec.num_parameters:,}",
    )  # fmt: skip


def _joint_row(site: str, mixer: JointMixer) -> tuple[str, ...]:
    spec = mixer.spec
    scales = ", ".join(f"{scale:.4g}" for scale in spec.scales) if spec.kernel_size else "–"
    return (
        site, str(spec.dim), str(spec.heads), str(spec.landmarks), str(spec.window or "–"),
        str(spec.kernel_size or "–"), scales, _dtypes(mixer.state_dict().values()),
        f"{spec.num_parameters:,}",
    )  # fmt: skip


def _dtypes(tensors: Iterable[Tensor]) -> str:
    return "/".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))


def _amount(tensors: Iterable[Tensor]) -> str:
    tensors = list(tensors)
    count = sum(tensor.numel() for tensor in tensors)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return f"{count:,} parameters, {size / 1e6:,.1f} MB"
