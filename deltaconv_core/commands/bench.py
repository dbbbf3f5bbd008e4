"""`bench`: what self-attention costs on this machine, layer by layer, and what ΔConv costs in its place."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from .. import bench
from ..block.spec import BlockSpec
from ..cli import printable
from ..errors import DeltaConvError
from ..sites import ARCHITECTURES, authors_specs
from ..sites.choose_specs import AUTHORS, FORMS, LEAN
from ..weights.checkpoint import check_deltaconv, load_checkpoint
from .writable import check_file

LEGEND = """\
Self-attention as PyTorch computes it here and ΔConv, one forward pass of all layers of a part, with random
weights. times, fewer: attention's figure divided by ΔConv's. A model does more than self-attention: how much
faster a whole one gets, the node ΔConv Benchmark measures in ComfyUI."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the model, the size of the picture, and the machine."""
    parser.add_argument(
        "file", metavar="FILE", nargs="?", help="a checkpoint with trained blocks (default: as published)"
    )
    parser.add_argument(
        "--architecture", choices=ARCHITECTURES, default="sd15", help="without a FILE (%(default)s)"
    )
    parser.add_argument(
        "--form",
        choices=FORMS,
        default=AUTHORS,
        help="of the blocks without a FILE: as the authors published, or lean, as new ones are (%(default)s)",
    )
    parser.add_argument(
        "--size", metavar="WxH", help="of the picture, such as 768 or 1024x576 (512 on a CPU, else 1024)"
    )
    parser.add_argument("--batch", type=int, default=1, help="samples in a forward pass (%(default)s)")
    parser.add_argument("--device", help="such as cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=bench.DTYPES, help="default: float32 on a CPU, else float16")
    parser.add_argument("--repeats", type=int, help="timed runs of each (default: 3 on a CPU, else 20)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there too")


def run(options: argparse.Namespace) -> int:
    """Measures, and prints the table."""
    device = bench.pick_device(options.device)
    dtype = bench.pick_dtype(options.dtype, device)
    on_cpu = device.type == "cpu"
    size = bench.parse_size(options.size or ("512" if on_cpu else "1024"))
    repeats = options.repeats or (3 if on_cpu else 20)
    for name in ("batch", "repeats"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise DeltaConvError(f"expected --{name} to be at least 1, got {value}")
    if options.json is not None:
        check_file(options.json, "--json")
    architecture, specs = _model(options)
    layers = bench.layers_of(architecture, bench.latent_of(size), specs)
    print(printable(_title(architecture, size, options.batch, dtype, device)), flush=True)
    costs = list(bench.measure_layers(layers, options.batch, device, dtype, repeats))
    print(f"\n{bench.layer_table(costs)}\n\n{LEGEND}")
    if options.json is not None:
        figures = {
            **bench.describe(device),
            "dtype": str(dtype).removeprefix("torch."),
            "architecture": architecture,
            "size": size,
            "batch": options.batch,
            "rows": [asdict(cost) for cost in costs],
        }
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def _model(options: argparse.Namespace) -> tuple[str, Mapping[str, BlockSpec]]:
    """The architecture, and its blocks by site: those of the file where one is named."""
    if options.file is None:
        specs = authors_specs(options.architecture)
        if options.form == LEAN:
            specs = {site: BlockSpec.lean(spec.dim, spec.kernel_size) for site, spec in specs.items()}
        return options.architecture, specs
    checkpoint = load_checkpoint(options.file)
    check_deltaconv(checkpoint, "bench")
    return checkpoint.architecture, {site: block.spec for site, block in checkpoint.blocks.items()}


def _title(
    architecture: str, size: tuple[int, int], batch: int, dtype: torch.dtype, device: torch.device
) -> str:
    name = str(dtype).removeprefix("torch.")
    machine = f"{bench.device_name(device)}, torch {torch.__version__}"
    return f"{architecture}, {size[0]} x {size[1]}, batch {batch}, {name}; {machine}"
