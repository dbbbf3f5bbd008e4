"""`convert`: any checkpoint that can be read, written in any form that it fits."""

from __future__ import annotations

import argparse
from fractions import Fraction
from pathlib import Path

from ..block.spec import GATES, POOLINGS
from ..errors import DeltaConvError
from ..util.devices import DTYPES
from ..weights.authors_write import save_authors
from ..weights.cast import cast
from ..weights.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ..weights.hub_folder import check_new, save_hub_folder
from .writable import check_file, check_folder

TOLD_BY_BLOCKS = ("architecture", "format", "specs", "deltaconv", "gate", "scales", "pooling")
WRITERS = {"deltaconv": save_checkpoint, "diffusers": save_hub_folder, "authors": save_authors}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds both files, and what the input may not say about its blocks."""
    parser.add_argument("input", metavar="IN", help="a .safetensors checkpoint, or a folder with one")
    parser.add_argument("output", metavar="OUT", type=Path, help="the file or folder to write")
    parser.add_argument(
        "--as",
        "--form",  # its earlier name
        dest="kind",
        choices=WRITERS,
        default="deltaconv",
        help="deltaconv: our own file. diffusers: a folder with config and model card, ready to be pushed to "
        "the Hugging Face Hub. authors: a file such as the authors', where the blocks allow that "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--metadata",
        metavar="NAME=TEXT",
        type=_named_text,
        action="append",
        default=[],
        help="a text to put into OUT, such as license=MIT, base_model=owner/name, title=... (repeatable)",
    )
    parser.add_argument(
        "--gate", choices=GATES, help="gate of every block, if IN does not say or says it wrong"
    )
    parser.add_argument(
        "--scales", type=_scales, metavar="LIST", help="scales of every block, e.g. 1,1/2,1/3"
    )
    parser.add_argument("--pooling", choices=POOLINGS, help="pooling of every block")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="store all weights in this dtype (default: as they are)"
    )


def run(options: argparse.Namespace) -> int:
    """Reads, casts, writes."""
    _check_output(options.output, options.kind)
    checkpoint = load_checkpoint(
        options.input, gate=options.gate, scales=options.scales, pooling=options.pooling
    )
    if options.dtype is not None:
        checkpoint = cast(checkpoint, DTYPES[options.dtype])
    _check_metadata(options.metadata, checkpoint)
    checkpoint.metadata |= dict(options.metadata)
    WRITERS[options.kind](checkpoint, options.output)
    print(f"wrote {len(checkpoint.blocks)} blocks of {checkpoint.architecture} to {options.output}")
    return 0


def _check_output(output: Path, kind: str) -> None:
    """Refuses what cannot be written, before anything is read."""
    if WRITERS[kind] is save_hub_folder:
        check_new(output)
        check_folder(output, "OUT")
        return
    if output.suffix != ".safetensors":
        raise DeltaConvError(
            f"expected OUT to end with .safetensors, which is what is written, got {output}; other programs "
            "go by the ending"
        )
    check_file(output, "OUT")


def _check_metadata(texts: list[tuple[str, str]], checkpoint: Checkpoint) -> None:
    """Refuses texts that say something else than the blocks themselves do."""
    for name, text in texts:
        if name in TOLD_BY_BLOCKS and not (name == "architecture" and text == checkpoint.architecture):
            raise DeltaConvError(
                f"--metadata {name}={text} would contradict the blocks, which are of "
                f"{checkpoint.architecture}: {name} follows from them"
                + (f"; to change it, use --{name}" if name in ("gate", "scales", "pooling") else "")
            )


def _named_text(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=TEXT, got {text!r}")
    return name, value


def _scales(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(Fraction(part.strip())) for part in text.split(","))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"expected numbers like 1,1/2,1/3, got {text!r}") from None
