"""The command line: `python -m deltaconv_core COMMAND`; each command is a module of `commands`.

Only the command that is asked for is imported.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from .errors import LONGEST_MESSAGE, DeltaConvError
from .util.text import shortened

COMMANDS = {
    "fetch": "fetch published weights, or list them",
    "inspect": "print what a checkpoint file holds",
    "convert": "read a checkpoint of any known form and write it in another",
    "locality": "show how local a diffusers model's self-attention is",
    "bench": "measure what self-attention and ΔConv cost on this machine",
    "convert-model": "replace a diffusers model's self-attention by cheaper mixers, in minutes, untrained",
    "distill": "train ΔConv blocks to stand in for a model's self-attention",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit status: the command's own, or 2 after one line on stderr for input that cannot be used.
    """
    parser = argparse.ArgumentParser(prog="python -m deltaconv_core", description="DeltaConv without a host.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    given = sys.argv[1:] if arguments is None else arguments
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name in given:
            module = import_module(f".commands.{name.replace('-', '_')}", __package__)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    options = parser.parse_args(given)
    try:
        return int(options.run(options))
    except (DeltaConvError, OSError) as error:
        print(f"error: {printable(shortened(str(error), LONGEST_MESSAGE))}", file=sys.stderr)
        return 2


def printable(text: str) -> str:
    """One line without control characters, for text that may come out of a file."""
    return "".join(c if c.isprintable() else " " for c in text)
