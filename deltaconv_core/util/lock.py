"""A lock among threads and processes; the system releases it when its process ends, however it ends."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

FAR = 1 << 30  # Windows locks bytes; this one is behind everything that is written
SOON = 0.02  # seconds between two tries


@contextmanager
def held(path: Path, seconds: float) -> Iterator[None]:
    """Holds a lock file, in which it says who holds it, and which is gone afterwards.

    Args:
        path: of the lock file.
        seconds: to wait for it.

    Raises:
        TimeoutError: somebody else held it all the time; says who.
        OSError: it cannot be made, or there are no locks there.
    """
    end = time.monotonic() + seconds
    while (handle := _taken(path)) is None:
        if time.monotonic() > end:
            raise TimeoutError(f"{path} is held by {holder(path) or 'another process'}")
        time.sleep(SOON)
    try:
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}, since {when}".encode())
        yield
    finally:
        with suppress(OSError):  # Windows removes no file that somebody has open
            os.unlink(path)
        os.close(handle)


def holder(path: Path) -> str:
    """Who holds a lock file, as far as it says."""
    with suppress(OSError, ValueError):
        return path.read_text(encoding="utf-8")[:200].strip()
    return ""


def _taken(path: Path) -> int | None:
    """A handle of the lock file, locked; None where somebody else has it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if _lock(handle) and _is_still(path, handle):
            os.ftruncate(handle, 0)
            return handle
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None


def _lock(handle: int) -> bool:
    try:
        if sys.platform == "win32":
            os.lseek(handle, FAR, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            os.lseek(handle, 0, os.SEEK_SET)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _is_still(path: Path, handle: int) -> bool:
    """Whether the file is the one there: who held it before may have removed it."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False
