"""Reads the options of `distill`: on the command line, and in a file."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from ...distill.fields import PARTS, About, by_name, default_text
from ...errors import DeltaConvError
from ...util.foreign_json import parse_json
from ...util.text import quoted
from .options import Options

MOST_YAML = 10_000  # characters
OPTIONS = dict(sorted(by_name(Options).items(), key=lambda item: item[1].default is not MISSING))
"""Those that have to be given come first."""
MORE = {
    "batch_size": "Those of all processes count together",
    "kernel_sizes": "Or a .json file with such JSON, as `locality` writes",
    "precision": "With auto, `accelerate launch --mixed_precision` decides if it is given",
}
"""What is true of the command only, by option."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds every option, and `--config`. What is not given is not in the namespace."""
    parser.usage = "%(prog)s --model PATH --data PATH [--output PATH] [option ...]"
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help="a JSON or YAML file with these options, such as the config.json in the folder of a run; what "
        "is given on the command line wins",
    )
    groups = {part: parser.add_argument_group(part) for part in PARTS}
    for one in OPTIONS.values():
        add_option(groups[About.of(one).part], one)


def add_option(group: argparse._ActionsContainer, one: Field[Any], help: str = "") -> None:
    """Adds one of `OPTIONS`; `help`: in place of its own."""
    common: dict[str, Any] = {
        "default": argparse.SUPPRESS,
        "help": (help or help_text(one)).replace("%", "%%"),
    }
    if KINDS[one.name] is SWITCH:
        group.add_argument(flag(one.name), action=argparse.BooleanOptionalAction, **common)
    else:
        group.add_argument(flag(one.name), metavar=_placeholder(one), type=_reader(one), **common)


def flag(name: str) -> str:
    """An option as it is typed."""
    return f"--{name.replace('_', '-')}"


def help_text(one: Field[Any]) -> str:
    """What an option does, and its default."""
    more = f". {MORE[one.name]}" if one.name in MORE else ""
    default = default_text(one) if one.default is MISSING else f"default: {default_text(one)}"
    return f"{About.of(one).text}{more} ({default})"


def read_options(given: Mapping[str, Any], file: Path | None) -> Options:
    """The options of a run.

    Args:
        given: name -> value, from the command line.
        file: with the others.

    Raises:
        DeltaConvError: a file that cannot be read, names or values in it that are no options, or an option
            that has to be given and is not.
    """
    values: dict[str, Any] = {}
    if file is not None:
        stated = _read_file(file)
        unknown = sorted(str(name) for name in stated if name not in OPTIONS)
        if unknown:
            raise DeltaConvError(
                f"{file} has {', '.join(unknown)}, which distill does not know; it knows {', '.join(OPTIONS)}"
            )
        for name, value in stated.items():
            if value is not None:
                values[name] = _read(OPTIONS[name], value if isinstance(value, str) else _as_text(value))
    values |= given
    missing = [flag(name) for name, one in OPTIONS.items() if one.default is MISSING and name not in values]
    if missing:
        raise DeltaConvError(f"expected {' and '.join(missing)}, on the command line or in --config")
    return Options(**values)


def _read_file(file: Path) -> dict[Any, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DeltaConvError(
            f"cannot read the options in {file} ({error}); check its name, and save it as UTF-8"
        ) from error
    values = _parse_json(file, text) if file.suffix.lower() == ".json" else _parse_yaml(file, text)
    if not isinstance(values, dict):
        raise DeltaConvError(f"expected {file} to hold options and their values, got {type(values).__name__}")
    return values


def _parse_json(file: Path, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise DeltaConvError(f"{file} is not JSON ({error}); correct it there") from error


def _parse_yaml(file: Path, text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise DeltaConvError(
            f"reading {file} needs PyYAML ({error}): pip install pyyaml, or write the options as .json"
        ) from error
    try:
        if len(text) > MOST_YAML:  # nested brackets take quadratic time
            raise ValueError(f"it has {len(text)} characters, at most {MOST_YAML} are read")
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError("it has aliases, by which few lines make very long values")
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise DeltaConvError(f"{file} is not YAML ({error}); correct it there") from error


def _as_text(value: Any) -> str:
    """A value of a file as JSON; dates and other things that only YAML has as their texts."""
    try:
        return json.dumps(value, default=str)
    except (ValueError, TypeError, RecursionError) as error:
        raise DeltaConvError(f"expected a number, a text or a list, got {quoted(value)} ({error})") from error


def _read(one: Field[Any], text: str) -> Any:
    kind = KINDS[one.name]
    try:
        value = kind.read(text)
    except (ValueError, KeyError):
        raise DeltaConvError(f"expected {one.name} to be {kind.expected}, got {quoted(text)}") from None
    if About.of(one).choices and (expected := About.of(one).expects(value)):
        raise DeltaConvError(f"expected {one.name} {expected}, got {quoted(text)}")
    return value


def _reader(one: Field[Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return _read(one, text)
        except DeltaConvError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def _placeholder(one: Field[Any]) -> str:
    choices = About.of(one).choices
    return "{" + ",".join(choices) + "}" if choices else KINDS[one.name].placeholder


class Kind(NamedTuple):
    """How a value of one type is read.

    Args:
        read: makes a value of a text; ValueError or KeyError if it is another one's.
        expected: what it is called.
        placeholder: stands for it in the help.
    """

    read: Callable[[str], Any]
    expected: str
    placeholder: str


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _pair(text: str) -> tuple[float, float]:
    """Two numbers with a comma between them, in brackets or not."""
    first, second = (_number(part) for part in text.strip("[]").split(","))
    return first, second


def _switch(text: str) -> bool:
    """JSON's words for it, and YAML's."""
    return {"true": True, "false": False}[text.lower()]


SWITCH = Kind(_switch, "true or false", "")
BY_TYPE = {
    int: Kind(int, "a whole number", "N"),
    float: Kind(_number, "a number", "X"),
    bool: SWITCH,
    str: Kind(str, "a text", "TEXT"),
    Path: Kind(Path, "a path", "PATH"),
}


def _kind(hint: Any) -> Kind:
    if get_origin(hint) is tuple:
        return Kind(_pair, "two numbers such as 0.9,0.99", "A,B")
    return BY_TYPE[next(iter(get_args(hint)), hint)]  # of `int | None`, int


KINDS = {name: _kind(hint) for name, hint in get_type_hints(Options).items()}
"""By option."""
