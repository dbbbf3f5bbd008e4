"""What Python does beside what it is asked: writing, starting programs, connecting."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.startfile")
CONNECTS = ("socket.connect", "socket.gethostbyname", "urllib.Request")  # numbers are looked up, too
CHANGES = {
    "os.mkdir": 0,
    "os.remove": 0,
    "os.rmdir": 0,
    "os.rename": 1,
    "os.link": 1,
    "os.symlink": 1,
    "os.truncate": 0,
}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Watch:
    """Notes what happens outside one folder, through Python's audit events; they cannot be unhooked."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    @contextmanager
    def over(self, folder: Path) -> Iterator[list[str]]:
        """Gathers what happens outside of the folder."""
        self.folder, self.seen = os.path.realpath(folder), []
        try:
            yield self.seen
        finally:
            self.folder = None

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in STARTS or event in CONNECTS:
            self.seen.append(f"{event} {args!r:.200}")
        elif event in CHANGES:
            self._note(event, args[CHANGES[event]])
        elif event == "open" and isinstance(args[2], int) and args[2] & WRITES:
            self._note(event, args[0])

    def _note(self, event: str, path: Any) -> None:
        if isinstance(path, (str, bytes, os.PathLike)):
            place = os.path.realpath(os.fsdecode(path))
            if not place.startswith(self.folder or "") and "__pycache__" not in place and place != os.devnull:
                self.seen.append(f"{event} {place!r:.200}")
