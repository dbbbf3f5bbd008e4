"""A widget to choose one of the files that are there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comfy_api.latest import io


class FileChoice(io.Combo.Input):
    """A list of names, which is made whenever the server asks for it and not when ComfyUI starts.

    At its start ComfyUI asks each node for its schema; what that reads from disk delays every start.

    Args:
        names: makes the list.
        more: as of ComfyUI's Combo.
    """

    def __init__(self, id: str, names: Callable[[], list[str]], **more: Any) -> None:
        self._names = names
        super().__init__(id, **more)

    @property
    def options(self) -> list[str]:
        """What there is to choose from now."""
        return self._names()

    @options.setter
    def options(self, none: None) -> None:
        """The base class sets what it was given, which is nothing."""
