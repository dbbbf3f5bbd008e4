"""Is this file what its record promises? Size, hash, and a safetensors header that fits the file.

A record without a sha256 is trusted on first use: the hash of the first file is written beside it
(`<file>.sha256`, in the form `sha256sum -c` reads) and every later load is compared with that.

The whole file is hashed once per process, however often it is loaded; after that the hash is taken from
memory as long as device, inode, size, modification and change time are the same. The change time cannot be
set by hand on Linux and macOS, so a changed file is noticed even when its modification time was put back. A
file younger than two seconds is never remembered, because clocks of file systems are coarse and a change in
the same tick would not show.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

from ...errors import CheckpointError, FetchError
from ...util.whole_file import write_text
from ..manifest import Record, RepositorySource
from ..safefile import read_header

log = logging.getLogger(__name__)

BLOCK = 1 << 20  # bytes read at once


class KnownHashes:
    """The hashes of files that this process has read: (device, inode, size, times) -> 64 hex digits."""

    def __init__(self) -> None:
        self.hashes: dict[tuple[int, ...], str] = {}

    def reset(self) -> None:
        """As in a new process: every file is read again."""
        self.hashes.clear()


known = KnownHashes()


def verify(
    path: Path,
    record: Record,
    *,
    final: Path | None = None,
    promised: str | None = None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Raise FetchError unless the file is the one of the record.

    Args:
        path: the file.
        record: what it should be.
        final: the name that the file is going to get, when that is not `path`; the pin lies beside it.
        promised: sha256 that the source states (the Hub does), used when nothing better is known.
        check: called between blocks; raises to stop.
    """
    size = path.stat().st_size
    if record.size is not None and size != record.size:
        raise FetchError(f"{path} has {size} bytes, expected {record.size}; {_remedy(record, final)}")
    try:
        read_header(path)
    except CheckpointError as error:
        raise FetchError(str(error)) from error
    pin = pin_path(final or path)
    pinned = read_pin(final or path)
    expected = record.sha256 or pinned or promised
    digest = sha256_of(path, check)
    if expected is not None and digest != expected:
        source = "the manifest" if record.sha256 else pin.name if pinned else "the Hub"
        hint = f"; if the file was changed on purpose, delete {pin}" if source == pin.name else ""
        raise FetchError(
            f"{path} has sha256 {digest}, expected {expected} by {source}; {_remedy(record, final)}{hint}"
        )
    if record.sha256 is None and pinned is None:
        _write_pin(pin, digest, record, promised)


def _remedy(record: Record, final: Path | None) -> str:
    if isinstance(record.source, RepositorySource):
        return "restore it from the repository"
    return "it was thrown away, fetch it again" if final else "delete it to have it fetched again"


def pin_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def read_pin(path: Path) -> str | None:
    """The sha256 recorded when the file was first trusted; None when there is no record.

    Raises:
        FetchError: the record is there and holds no hash.
    """
    pin = pin_path(path)
    if not pin.exists():
        return None
    digest = pin.read_text(encoding="utf-8", errors="replace")[:64]
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise FetchError(f"{pin} should hold a sha256 and does not; delete it to trust {path.name} as it is")
    return digest


def _write_pin(pin: Path, digest: str, record: Record, promised: str | None) -> None:
    """Write the pin at once or not at all. A folder that cannot be written to does not keep a file from
    being used."""
    told = "the Hub states the same" if promised else "nobody states one, so this file is trusted now"
    log.warning("%s: the manifest knows no sha256; %s: %s; pinned in %s", record.name, told, digest, pin)
    try:
        write_text(pin, f"{digest}  {record.filename}\n")
    except OSError as error:
        log.warning("%s: cannot be pinned: %s", record.name, error)


def sha256_of(path: Path, check: Callable[[], None] = lambda: None) -> str:
    """Hash of the whole file, as 64 hex digits."""
    stat = path.stat()
    identity = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if identity in known.hashes:
        return known.hashes[identity]
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
            check()
    if time.time() - max(stat.st_mtime, stat.st_ctime) > 2:
        known.hashes[identity] = digest.hexdigest()
    return digest.hexdigest()
