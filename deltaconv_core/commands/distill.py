"""`distill`: train blocks for a diffusers model or a single file, on one GPU or many."""

from __future__ import annotations

import argparse
import sys

from ..diffusers.distill.parse import add_options, read_options
from .writable import check_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds all options."""
    parser.epilog = (
        "On several GPUs: accelerate launch --num_processes N -m deltaconv_core distill ... Ctrl+C saves; "
        "the same command resumes."
    )
    add_options(parser)


def run(options: argparse.Namespace) -> int:
    """Trains."""
    given = dict(vars(options))
    del given["run"]
    read = read_options(given, given.pop("config"))
    check_folder(read.output, "--output")
    if read.cache is not None:
        check_folder(read.cache, "--cache")
    from ..diffusers.distill.run import train  # what it needs is optional

    try:
        return train(read)
    except KeyboardInterrupt:
        print("stopped before the training; what has been encoded is kept", file=sys.stderr)
        return 130
