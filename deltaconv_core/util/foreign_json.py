"""JSON that others wrote: read with one kind of error, and shallow enough for whatever looks at it next."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEEPEST = 64
"""Levels of nesting. Printing, comparing and checking a value recurse too, so what parses may fail later."""
TOO_DEEP = f"it is nested more than {DEEPEST} levels deep"


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: not JSON, nested too deeply, or a text in it with half a surrogate pair, which can be
            neither printed nor be the name of a file.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    return _checked(value)


def parse_list(text: str) -> list[Any]:
    """The items of a JSON list, each by itself: in place of one that `parse_json` refuses, its error stands.

    Raises:
        ValueError: not JSON, or not a list.
    """
    try:
        values = json.loads(text)
    except RecursionError:
        if not text.lstrip().startswith("["):
            raise ValueError(TOO_DEEP) from None
        return [_value_or_error(parse_json, item) for item in _items_of(text)]
    if not isinstance(values, list):
        raise ValueError(f"expected a list, got {type(values).__name__}")
    return [_value_or_error(_checked, value) for value in values]


def read_json(path: Path) -> Any:
    """The value of a JSON file in UTF-8.

    Raises:
        OSError: it cannot be read.
        ValueError: as `parse_json`, or it is not UTF-8.
    """
    return parse_json(path.read_text(encoding="utf-8-sig"))


def _checked(value: Any) -> Any:
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [item for one in level for item in _items(one)]
        if not level:
            return value
    raise ValueError(TOO_DEEP)


def _value_or_error(read: Callable[[Any], Any], item: Any) -> Any:
    try:
        return read(item)
    except ValueError as error:
        return error


def _items_of(text: str) -> list[str]:
    """The texts of a list's items, found by their brackets and commas."""
    depth, start, items = 0, 0, []
    for token in re.finditer(r'"[^"\\]*(?:\\.[^"\\]*)*"|[][{},]', text):
        if token[0] in "]}":
            depth -= 1
        if depth == (0 if token[0] == "]" else 1) and token[0] in ",]":
            items.append(text[start : token.start()])
            start = token.end()
        if token[0] in "[{":
            depth += 1
            start = token.end() if depth == 1 else start
    if depth:
        raise ValueError(f"{TOO_DEEP}, and {depth} brackets are not closed")
    return items


def _items(value: Any) -> list[Any]:
    if isinstance(value, str):
        if not value.isascii():
            value.encode()  # UnicodeEncodeError is a ValueError
        return []
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else []
