"""`convert-model`: hybrid or joint mixers for a diffusers model, fitted in minutes and without training."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from ..bench.sizes import parse_size
from ..cli import printable
from ..diffusers.distill.parse import OPTIONS, add_option
from ..distill.conversion import QUALITY, SPEED, Wishes
from ..errors import DeltaConvError
from ..util.devices import DTYPES, pick_device
from ..weights.checkpoint import save_checkpoint
from .writable import check_file

USUAL = 1024  # pixels, where a pipeline does not say
SOURCE = ("model", "variant", "model_config", "tokenizer", "prediction")
MODEL_HELP = (
    "the folder of a diffusers pipeline (Stable Diffusion 1.x, 2.x, SDXL, PixArt, FLUX, Chroma, SD 3, "
    "Lumina 2, Z-Image, Qwen-Image), or a .safetensors file with a whole Stable Diffusion model (required)"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the model, the pictures, the budget and the file."""
    parser.usage = "%(prog)s --model PATH --output FILE [option ...]"
    parser.epilog = "The file loads in ComfyUI (ΔConv Patch Model) and in diffusers, on fine-tunes too."
    model = parser.add_argument_group("model")
    for name in SOURCE:
        add_option(model, OPTIONS[name], MODEL_HELP if name == "model" else "")
    default = Wishes()
    add = parser.add_argument_group("budget").add_argument
    add(
        "--max-error",
        type=float,
        metavar="X",
        help="quality: the fastest mixers whose error is at most this part of what attention answers "
        f"(default: {default.limit:g})",
    )
    add(
        "--max-time",
        type=float,
        metavar="X",
        help="speed, instead: the least error at which all self-attentions take this part of their time",
    )
    add("--blocks", default="all", help="what may be replaced: all, down, mid, up, names, globs; - excludes")
    add = parser.add_argument_group("calibration").add_argument
    add(
        "--prompt",
        nargs="+",
        default=["a photograph"],
        metavar="TEXT",
        help="what the pictures show, by turns; best what you often draw (default: a photograph)",
    )
    add("--negative", default="", metavar="TEXT", help="negative prompt of all (default: none)")
    add("--size", metavar="WxH", help="of the pictures, and the size to be fast at (default: the pipeline's)")
    add("--pictures", type=int, default=default.pictures, metavar="N", help="(default: %(default)s)")
    add("--steps", type=int, default=4, metavar="N", help="of each picture (default: %(default)s)")
    add("--seed", type=int, default=default.seed, metavar="N", help="of the noise (default: %(default)s)")
    add = parser.add_argument_group("the run").add_argument
    add("--output", type=Path, metavar="FILE", help="for the mixers, .safetensors (required)")
    add("--license", default="", metavar="TEXT", help="of the result; kept in the file")
    add("--device", help="such as cuda or cpu (default: cuda where there is one)")
    add(
        "--dtype",
        choices=DTYPES,
        help="of the model (default: float32 on a CPU, else bfloat16 for models of text and image "
        "together and float16 for others)",
    )


def run(options: argparse.Namespace) -> int:
    """Converts, writes the file, and prints the report."""
    for name in ("model", "output"):
        if getattr(options, name, None) is None:
            raise DeltaConvError(f"expected --{name} {name.upper()}, got none; see --help")
    if options.max_error is not None and options.max_time is not None:
        raise DeltaConvError(
            f"expected --max-error or --max-time, got both ({options.max_error:g} and "
            f"{options.max_time:g}); leave one out"
        )
    wishes = Wishes(pictures=options.pictures, seed=options.seed)
    if options.max_error is not None:
        wishes = Wishes(QUALITY, options.max_error, options.pictures, options.seed)
    if options.max_time is not None:
        wishes = Wishes(SPEED, options.max_time, options.pictures, options.seed)
    size = None if options.size is None else parse_size(options.size)
    device = pick_device(options.device)
    check_file(options.output, "--output")
    # What these need is optional.
    from ..diffusers.conversion import Pictures, convert
    from ..diffusers.distill.teacher import weights_fingerprint
    from ..diffusers.sites import network_of
    from ..distill import conversion_report

    pipeline, resolution = _load(options, device)
    width, height = size or (resolution, resolution)
    pictures = Pictures(options.prompt, options.negative, width, height, options.steps)
    pipeline.to(device)

    def done(count: int) -> None:
        print(f"picture {count} of {wishes.pictures}", file=sys.stderr, flush=True)

    found, result = convert(pipeline, pictures, wishes, options.blocks, done)
    print(printable_lines(conversion_report.report_text(result, (width, height), options.steps)))
    metadata = {
        "teacher": f"{options.model.resolve().name} {weights_fingerprint(network_of(pipeline))}",
        "source": "converted with python -m deltaconv_core convert-model",
        "pictures": f"{wishes.pictures} of {width}x{height}, {options.steps} steps",
    }
    metadata |= {"license": options.license} if options.license else {}
    checkpoint = result.checkpoint(found.architecture, found.channels, metadata)
    if not checkpoint.blocks:
        raise DeltaConvError(
            f"no mixer pays at {width} x {height} within this budget, so nothing is saved; convert at "
            "a larger size, or allow larger errors"
        )
    save_checkpoint(checkpoint, options.output)
    print(f"\nWritten to {printable(str(options.output))}.")
    return 0


def _load(options: argparse.Namespace, device: torch.device) -> tuple[Any, int]:
    """The pipeline, and the side in pixels of the squares that its model was made for."""
    from ..diffusers.distill.teacher import Source, load_teacher
    from ..diffusers.pipeline_folder import load_joint

    on_gpu = device.type != "cpu"
    pipeline = None
    if options.model.is_dir():
        # float16 is too narrow for what these models compute.
        dtype = DTYPES[options.dtype or ("bfloat16" if on_gpu else "float32")]
        pipeline = load_joint(options.model, dtype, getattr(options, "variant", None))
    if pipeline is not None:
        latent = getattr(pipeline, "default_sample_size", None)
        return pipeline, int(latent * pipeline.vae_scale_factor) if latent else USUAL
    given = {name: getattr(options, name) for name in SOURCE if hasattr(options, name)}
    teacher = load_teacher(Source(**given), DTYPES[options.dtype or ("float16" if on_gpu else "float32")])
    return teacher.pipeline, teacher.resolution


def printable_lines(text: str) -> str:
    """The text with each line `printable`."""
    return "\n".join(map(printable, text.splitlines()))
