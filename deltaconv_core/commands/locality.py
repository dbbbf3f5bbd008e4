"""`locality`: how local the self-attention of a diffusers model is."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ..cli import printable
from ..errors import DeltaConvError
from ..locality import check_limit, recommend
from ..locality.recommend import LARGEST_RECOMMENDED
from ..locality.sampled_steps import spread
from ..util.devices import DTYPES, pick_device
from .writable import check_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the model, the picture and where the results go."""
    parser.add_argument(
        "model", metavar="MODEL", type=Path, help="folder of a diffusers pipeline, with its model_index.json"
    )
    parser.add_argument(
        "--variant", help="which of the weights in the folder, such as fp16 (default: those without a name)"
    )
    parser.add_argument(
        "--output", metavar="DIR", type=Path, default=Path("locality"), help="for the results (%(default)s)"
    )
    parser.add_argument("--prompt", default="a photograph", help="of the picture that is drawn (%(default)s)")
    parser.add_argument("--width", type=int, help="in pixels (default: the pipeline's own)")
    parser.add_argument("--height", type=int, help="in pixels (default: the pipeline's own)")
    parser.add_argument("--steps", type=int, default=20, help="of the sampling (%(default)s)")
    parser.add_argument("--looks", type=int, default=4, help="steps that are looked at (%(default)s)")
    parser.add_argument(
        "--blocks", default="all", help="layers to look at: all, down, mid, up, names, globs; - excludes"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")
    parser.add_argument(
        "--max-kernel-size",
        type=int,
        default=LARGEST_RECOMMENDED,
        help="largest K to recommend, odd (%(default)s)",
    )
    parser.add_argument("--device", help="such as cuda or cpu (default: cuda where there is one)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the model (default: float32 on a CPU, else float16)"
    )


def run(options: argparse.Namespace) -> int:
    """Looks, prints the table, and writes the pictures, tables and advice."""
    check_limit(options.max_kernel_size)
    spread(options.steps, options.looks)
    device = pick_device(options.device)
    # What these need is optional.
    from ..diffusers.locality import LookSettings, look
    from ..locality.figure import check_matplotlib, save
    from ..locality.table import text, write_csv

    check_matplotlib()
    dtype = DTYPES[options.dtype or ("float32" if device.type == "cpu" else "float16")]
    check_folder(options.output, "--output")
    pipeline = _load(options.model, device, dtype, options.variant)
    settings = LookSettings(
        options.prompt, options.width, options.height, options.steps, options.looks, options.seed
    )
    architecture, layers = look(pipeline, settings, options.blocks)
    advice = recommend(layers, architecture, options.max_kernel_size)
    title = f"Self-attention of {architecture}: {printable(options.model.resolve().name)}"
    options.output.mkdir(parents=True, exist_ok=True)
    write_csv(layers, advice, options.output)
    (options.output / "recommendation.json").write_text(advice.to_json(), encoding="utf-8")
    save(options.output / "locality.png", layers, advice, title)
    print(f"{title}\n\n{text(layers, advice)}\n")
    print(f"Written to {options.output}: locality.png, layers.csv, curves.csv, recommendation.json")
    return 0


def _load(folder: Path, device: torch.device, dtype: torch.dtype, variant: str | None) -> Any:
    try:
        import diffusers  # noqa: F401
    except ImportError:
        raise DeltaConvError(
            "this needs the diffusers library: pip install '.[diffusers]' in the folder of ComfyUI-DeltaConv"
        ) from None
    from ..diffusers.pipeline_folder import load_pipeline, loading, read_index

    read_index(folder)
    with loading(folder):
        return load_pipeline(folder, dtype, variant).to(device)
