"""Saying something once in a process, however often there is a reason to."""

from __future__ import annotations

from collections.abc import Callable


class Once:
    """Passes each sentence on the first time that it is said.

    Args:
        tell: takes the sentence, such as `log.info`.
    """

    def __init__(self, tell: Callable[[str], object]) -> None:
        self._tell = tell
        self._said: set[str] = set()

    def __call__(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            self._tell(sentence)

    def reset(self) -> None:
        """Everything may be said again, as in a new process."""
        self._said.clear()
