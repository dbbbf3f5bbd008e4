"""Runs a transfer in a thread, so that the caller can stop it at any moment.

A read from a stalled connection cannot be interrupted, so the caller does not wait for it: it asks the part
for progress ten times a second and, when told to stop, closes the part and goes. Callbacks run in the
caller's thread because ComfyUI knows by the thread which node it is running.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from .part import Part

Progress = Callable[[int, "int | None"], object]
Cancelled = Callable[[], "bool | None"]
T = TypeVar("T")

INTERVAL = 0.1  # seconds


def watch(work: Callable[[], T], part: Part, progress: Progress | None, check: Callable[[], None]) -> T:
    """Run `work`, which writes into `part`, and return its result or raise its error."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # handed to the caller below
            errors.append(error)

    thread = threading.Thread(target=run, name="deltaconv-fetch", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(INTERVAL)
            check()
            if progress is not None:
                progress(part.tell(), part.total)
    except BaseException:
        part.close()
        raise
    if errors:
        raise errors[0]
    return results[0]
