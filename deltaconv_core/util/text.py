"""Text for people: tables, lists and quotes of bounded length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def markdown(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The lines of a table in Markdown that is aligned as plain text too; only the first column on the left.

    Args:
        rows: at least one, each with a cell for every column, all in the same order.
    """
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    # At least two for the line below the head, "-:"; a colon alone makes no table.
    widths = [max(2, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    aligned = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return [f"| {' | '.join(line)} |" for line in aligned]


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table of plain text, every column on the left; all rows have as many cells."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def listing(names: Iterable[str], limit: int = 3) -> str:
    """The first few names in the order given, and how many more there are."""
    names = list(names)
    if not names:
        return "nothing"
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


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
