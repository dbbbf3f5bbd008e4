"""The options of `distill` on the command line, and in a file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from ...errors import DeltaConvError
from ...util.foreign_json import parse_json
from ...util.text import quoted
from .options import EXPECTED, Options, number, pair, switch

MOST_YAML = 10_000  # characters


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
    parts = dict.fromkeys(one.metadata["part"] for one in fields(Options))
    groups = {part: parser.add_argument_group(part) for part in parts}
    for one in fields(Options):
        about = one.metadata
        group = groups[about["part"]]
        flag, text = f"--{one.name.replace('_', '-')}", f"{about['text']} ({_default(one)})"
        common: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        if about["kind"] is switch:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        else:
            group.add_argument(flag, metavar=_placeholder(one), type=_reader(one), **common)


def read_options(given: Mapping[str, Any], file: Path | None) -> Options:
    """The options of a run.

    Args:
        given: name -> value, from the command line.
        file: with the others.

    Raises:
        DeltaConvError: a file that cannot be read, names or values in it that are no options, or an option
            that has to be given and is not.
    """
    known = {one.name: one for one in fields(Options)}
    values: dict[str, Any] = {}
    if file is not None:
        stated = _read_file(file)
        unknown = sorted(str(name) for name in stated if name not in known)
        if unknown:
            raise DeltaConvError(
                f"{file} has {', '.join(unknown)}, which distill does not know; it knows {', '.join(known)}"
            )
        for name, value in stated.items():
            if value is not None:
                values[name] = _read(known[name], value if isinstance(value, str) else _as_text(value))
    values |= given
    missing = [f"--{name}" for name, one in known.items() if one.default is MISSING and name not in values]
    if missing:
        raise DeltaConvError(f"expected {' and '.join(missing)}, on the command line or in --config")
    return Options(**values)


def _read_file(file: Path) -> dict[Any, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DeltaConvError(f"cannot read the options in {file} ({error})") from error
    values = _parse_json(file, text) if file.suffix.lower() == ".json" else _parse_yaml(file, text)
    if not isinstance(values, dict):
        raise DeltaConvError(f"expected {file} to hold options and their values, got {type(values).__name__}")
    return values


def _parse_json(file: Path, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise DeltaConvError(f"{file} is no JSON ({error})") from error


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
        raise DeltaConvError(f"{file} is no YAML ({error})") from error


def _as_text(value: Any) -> str:
    """A value of a file as JSON; dates and other things that only YAML has as their texts."""
    try:
        return json.dumps(value, default=str)
    except (ValueError, TypeError, RecursionError) as error:
        raise DeltaConvError(f"expected a number, a text or a list, got {quoted(value)} ({error})") from error


def _read(one: Field[Any], text: str) -> Any:
    kind, choices = one.metadata["kind"], one.metadata["choices"]
    try:
        value = kind(text)
    except (ValueError, KeyError):
        raise DeltaConvError(f"expected {one.name} to be {EXPECTED[kind]}, got {quoted(text)}") from None
    if choices and value not in choices:
        raise DeltaConvError(f"expected {one.name} to be one of {', '.join(choices)}, got {quoted(text)}")
    return value


def _reader(one: Field[Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return _read(one, text)
        except DeltaConvError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def _placeholder(one: Field[Any]) -> str:
    if one.metadata["choices"]:
        return "{" + ",".join(one.metadata["choices"]) + "}"
    names = {int: "N", number: "X", pair: "A,B", Path: "PATH"}
    return names.get(one.metadata["kind"], "TEXT")


def _default(one: Field[Any]) -> str:
    if one.default is MISSING:
        return "required"
    if one.default in (None, ""):
        return f"default: {one.metadata['shown']}"
    value = ",".join(map(str, one.default)) if isinstance(one.default, tuple) else one.default
    if isinstance(value, bool):
        value = "on" if value else "off"
    return f"default: {value}"
