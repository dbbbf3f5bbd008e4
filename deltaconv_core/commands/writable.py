"""Whether a command can write where it is told to: found out before it works, and nothing is left there."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import DeltaConvError
from ..util.whole_file import beside


def check_file(path: Path, option: str) -> None:
    """Checks that a file can be written, in a folder that is there.

    Args:
        path: of the file; one that is there may be replaced.
        option: how the user calls it, for the message.

    Raises:
        DeltaConvError: a folder that is not there or cannot be written to, or a name that no file can have.
    """
    try:
        if path.name in ("", "..") or os.path.isdir(path):
            raise IsADirectoryError(f"{path} is a folder, expected the name of a file")
        _try(beside(path))
    except (OSError, ValueError) as error:
        raise _refused(path, option, error) from error


def check_folder(path: Path, option: str) -> None:
    """Checks that a folder is there and can be written to, or can be made.

    Raises:
        DeltaConvError: otherwise.
    """
    whole = Path(os.path.abspath(path))
    try:
        there = next(one for one in (whole, *whole.parents) if os.path.lexists(one))
        if not os.path.isdir(there):
            raise NotADirectoryError(f"{there} is not a folder")
        for name in (*whole.relative_to(there).parts, "file"):
            _try(beside(there / name))
    except (OSError, ValueError) as error:
        raise _refused(path, option, error) from error


def _try(file: Path) -> None:
    with file.open("xb"):
        pass
    file.unlink()


def _refused(path: Path, option: str, error: Exception) -> DeltaConvError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return DeltaConvError(f"{option}: cannot write to {path}: {reason}; choose another place")
