"""One download at a time for one file, among threads and among processes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


@contextmanager
def locked(path: Path, check: Callable[[], None]) -> Iterator[None]:
    """Hold `.<name>.lock` beside the file. The system releases it when the process ends, however it ends.

    Args:
        path: the file that is going to be fetched.
        check: called while waiting; raises to give up.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path.with_name(f".{path.name}.lock"))
    waiting = False
    while True:
        try:
            lock.acquire(timeout=0.2)
            break
        except Timeout:
            if not waiting:
                log.info("%s is being fetched by another process; waiting for it", path.name)
                waiting = True
            check()
    try:
        yield
    finally:
        lock.release()
