"""JSON that others wrote: read with one kind of error, and shallow enough for whatever looks at it next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DEEPEST = 64
"""Levels of nesting. Printing, comparing and checking a value recurse too, so what parses may fail later."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: not JSON, nested too deeply, or a text in it with half a surrogate pair, which can be
            neither printed nor be the name of a file.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep") from None
    level = [value]
    for _ in range(DEEPEST):
        level = [item for one in level for item in _items(one)]
        if not level:
            return value
    raise ValueError(f"it is nested more than {DEEPEST} levels deep")


def read_json(path: Path) -> Any:
    """The value of a JSON file in UTF-8.

    Raises:
        OSError: it cannot be read.
        ValueError: as `parse_json`, or it is not UTF-8.
    """
    return parse_json(path.read_text(encoding="utf-8-sig"))


def _items(value: Any) -> list[Any]:
    if isinstance(value, str):
        if not value.isascii():
            value.encode()  # UnicodeEncodeError is a ValueError
        return []
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else []
