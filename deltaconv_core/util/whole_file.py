"""A file that is replaced as a whole: whatever happens, its place holds the old one or the new one."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` on leaving; after an error, nothing is left of it.

    Args:
        path: of the file, or of a folder that does not exist.
        durable: whether the file is on the disk before it gets its name, so that a power cut leaves the old
            one or the new one, too.

    Raises:
        OSError: the file cannot take its place.

    Example:
        >>> with replacing(Path("numbers.txt")) as part:
        ...     part.write_text("1 2 3")
    """
    part = beside(path)
    try:
        yield part
        if durable:
            _flush(part)
        os.replace(part, path)
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)
    if durable and os.name == "posix":
        _flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def beside(path: Path) -> Path:
    """A hidden path in the same folder that nobody else uses."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
