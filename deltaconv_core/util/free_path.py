"""Paths for what users name: inside the folder they belong in, and never one that is taken."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import DeltaConvError
from .names import why_not
from .text import quoted
from .whole_file import reserve

NUMBERS = range(1, 100_000)


def free_path(folder: Path, name: str, ending: str = "") -> Path:
    """A free path `<folder>/<name>_00001<ending>`, or the next number, in a folder that is made if need be.

    Nobody else gets it, in this process or another, until it is given back with `release`.

    Args:
        folder: where it is to be.
        name: may begin with subfolders, separated by "/".
        ending: of a file.

    Raises:
        DeltaConvError: a name that leads out of the folder or that some systems refuse, no free number, or a
            folder in which nothing can be made.
    """
    for part in (parts := name.strip().split("/")):
        if reason := why_not(part):
            raise DeltaConvError(
                f"expected a name such as 'mine' or 'folder/mine', got {quoted(name)}: {reason}"
            )
    target = folder.joinpath(*parts)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for number in NUMBERS:
            path = target.with_name(f"{target.name}_{number:05}{ending}")
            if not os.path.lexists(path) and reserve(path):
                return path
    except OSError as error:
        raise DeltaConvError(
            f"cannot make {target.name} in {target.parent} ({error}); choose another name or free some space"
        ) from error
    raise DeltaConvError(f"{folder} holds {len(NUMBERS)} of {quoted(name)} already; choose another name")
