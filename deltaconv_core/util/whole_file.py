"""A file that is replaced as a whole: whatever happens, its place holds the old one or the new one.

What a killed process was writing stays as a hidden part; those that nobody can be writing any more are
removed when something is next written in their folder.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl

PART = re.compile(r"\..+\.[0-9a-f]{8}\.part")
ABANDONED = 24 * 60 * 60
"""Seconds after which nobody writes to a part any more."""


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
    with _parts_of(path.parent), _part(path) as part:
        yield part
        if durable:
            _flush(part)
        os.replace(part, path)
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


def reserve(path: Path) -> bool:
    """Keeps the name of a file that is not there for the caller, until `release`; False where it is taken.

    Raises:
        OSError: nothing can be made in its folder.
    """
    try:
        _reservation(path).open("x").close()
    except FileExistsError:
        return False
    if not os.path.lexists(path):
        return True
    release(path)
    return False


def release(path: Path) -> None:
    """Ends what `reserve` began; that of a process that was killed ends when its part is swept."""
    _reservation(path).unlink(missing_ok=True)


def _reservation(path: Path) -> Path:
    return path.with_name(f".{path.name}.{0:08x}.part")


@contextmanager
def _part(path: Path) -> Iterator[Path]:
    part = beside(path)
    try:
        yield part
    finally:
        _remove(part)


def _remove(part: Path) -> None:
    if part.is_dir():
        shutil.rmtree(part, ignore_errors=True)
    else:
        part.unlink(missing_ok=True)


@contextmanager
def _parts_of(folder: Path) -> Iterator[None]:
    """Inside, nobody removes parts in the folder; before, those that were left there are removed."""
    if sys.platform == "win32":  # where a file that is open cannot be removed
        _sweep(folder)
        yield
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # what is wrong with the folder shows when something is written in it
        yield
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _sweep(folder)
            fcntl.flock(handle, fcntl.LOCK_SH)
        except BlockingIOError:
            fcntl.flock(handle, fcntl.LOCK_SH)
        except OSError:  # a file system without locks
            _sweep(folder)
        yield
    finally:
        os.close(handle)


def _sweep(folder: Path) -> None:
    try:
        for entry in os.scandir(folder):
            if PART.fullmatch(entry.name) and time.time() - entry.stat().st_mtime > ABANDONED:
                _remove(Path(entry.path))
    except OSError:  # of other users, or already gone: they stay
        pass


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
