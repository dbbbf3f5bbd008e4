"""The command line: `python -m deltaconv_core COMMAND`; each command is a module of `commands`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from .errors import LONGEST, DeltaConvError
from .util.text import shortened

COMMANDS = ("fetch", "inspect", "convert", "locality", "bench", "distill")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit status: the command's own, or 2 after one line on stderr for input that cannot be used.
    """
    parser = argparse.ArgumentParser(prog="python -m deltaconv_core", description="DeltaConv without a host.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = import_module(f".commands.{name}", __package__)
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except (DeltaConvError, OSError) as error:
        print(f"error: {printable(shortened(str(error), LONGEST))}", file=sys.stderr)
        return 2


def printable(text: str) -> str:
    """One line without control characters, for text that may come out of a file."""
    return "".join(c if c.isprintable() else " " for c in text)
