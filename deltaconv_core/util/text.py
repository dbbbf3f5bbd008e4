"""Text for people: tables in Markdown that are aligned as plain text too, and quotes of bounded length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def markdown(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The lines of a table; the first column on the left, all others on the right.

    Args:
        rows: at least one, each with a cell for every column, all in the same order.
    """
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    aligned = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return [f"| {' | '.join(line)} |" for line in aligned]


def shortened(text: str, limit: int) -> str:
    """A text of at most `limit` characters: beginning and end, where it was longer."""
    if len(text) <= limit:
        return text
    end = limit // 4
    return f"{text[: limit - end - 5]} ... {text[-end:]}"


def quoted(value: object, limit: int = 80) -> str:
    """A value that came from outside, as Python writes it, for a message."""
    if isinstance(value, (str, bytes)):  # the rest would be escaped for nothing
        value = value[: limit + 1]
    return shortened(repr(value), limit)
