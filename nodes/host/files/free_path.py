"""Paths for what users name: inside the folder they belong in, and never one that is taken."""

from __future__ import annotations

from pathlib import Path

from ....deltaconv_core.errors import DeltaConvError

FORBIDDEN = set('<>:"|?*\\\0')


def free_path(folder: Path, name: str, ending: str = "") -> Path:
    """A free path `<folder>/<name>_00001<ending>`, or the next number.

    Args:
        folder: where it is to be.
        name: may begin with subfolders, separated by "/".
        ending: of a file.

    Raises:
        DeltaConvError: an empty name, one that leads out of the folder, or characters that some systems
            refuse.
    """
    parts = name.strip().split("/")
    bad = sorted(FORBIDDEN & set(name)) or [c for c in name if ord(c) < 32]
    if bad or any(part != part.strip(" ") or not part or part.startswith(".") for part in parts):
        raise DeltaConvError(
            f"expected a name such as 'mine' or 'folder/mine', got {name!r}: no part of it may be empty or "
            f"begin with a dot, and it may not hold {' '.join(sorted(FORBIDDEN - set(chr(0))))}"
        )
    target = folder.joinpath(*parts)
    numbers = (target.with_name(f"{target.name}_{number:05}{ending}") for number in range(1, 100_000))
    return next(path for path in numbers if not path.exists())
