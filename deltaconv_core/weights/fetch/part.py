"""The file that a download grows in, and what it is a part of."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from types import TracebackType

from ...errors import FetchError
from ..safefile import begins_well


class Part:
    """`<file>.part`, opened where the last fetch stopped; `<file>.part.id` says what the bytes belong to.

    It has the methods of a binary file that huggingface_hub uses (write, tell, seek, truncate, name). After
    `close` every change is refused: a thread that is still stuck in a read cannot write into a part that
    someone else has taken over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        self.total: int | None = None  # bytes of the whole file, once known
        self._identity_path = path.with_name(path.name + ".id")
        for own in (path, self._identity_path):
            if own.is_symlink():
                own.unlink()  # never write through a link
        if not (path.is_file() and begins_well(path)):
            path.unlink(missing_ok=True)  # the page of a login, for example
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115

    def __enter__(self) -> Part:
        return self

    def __exit__(self, *exc: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop all writing; leave nothing behind when nothing arrived."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            size = self._file.tell()
            self._file.close()
        if size == 0:
            self.path.unlink(missing_ok=True)
            self.forget()

    @property
    def identity(self) -> str:
        """What the bytes belong to, as given to `restart`; empty when not known."""
        try:
            return self._identity_path.read_text(encoding="utf-8")
        except (OSError, ValueError):
            return ""

    def restart(self, identity: str) -> None:
        """Drop all bytes; those to come belong to `identity` (an address and its version, for example)."""
        with self._lock:
            self._check_open()
            self._file.seek(0)
            self._file.truncate()
            self._identity_path.write_text(identity, encoding="utf-8")

    def forget(self) -> None:
        """Drop the note of what the bytes belong to."""
        self._identity_path.unlink(missing_ok=True)

    def expect(self, total: int, stated: int | None) -> None:
        """Take note of the whole size and see that the disk has room for what is missing.

        Args:
            total: bytes of the whole file, as the source says.
            stated: bytes as the manifest says; None: not known.

        Raises:
            FetchError: the two differ, or the disk is too full.
        """
        if stated is not None and total != stated:
            raise FetchError(f"the source says {total} bytes, the manifest says {stated}; not fetched")
        self.total = total
        missing = total - self.tell()
        free = shutil.disk_usage(self.path.parent).free
        if missing > free:
            raise FetchError(
                f"{missing} bytes are to be fetched, but {self.path.parent} has {free} bytes free; free "
                "some space"
            )

    def flush(self) -> None:
        """Have the system write all bytes to the disk, so that a power cut leaves no hole behind the name."""
        with self._lock:
            os.fsync(self._file.fileno())

    def wait(self, seconds: float) -> bool:
        """Pause; ends early, with True, when the part is closed."""
        return self._closed.wait(seconds)

    def write(self, data: bytes) -> int:
        with self._lock:
            self._check_open()
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]
            return len(data)

    def tell(self) -> int:
        with self._lock:
            return self.path.stat().st_size if self._closed.is_set() else self._file.tell()

    def seek(self, position: int) -> int:
        with self._lock:
            self._check_open()
            return self._file.seek(position)

    def truncate(self) -> int:
        with self._lock:
            self._check_open()
            return self._file.truncate()

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise FetchError(f"{self.path} is closed")
