"""Encoded pictures and captions on disk.

An entry's name is a digest of all that it was made of, so what has changed is not found and is made again.
Entries are written whole or not at all, so several processes and runs may share a folder.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor

from ...errors import CheckpointError, DeltaConvError
from ...weights.safefile import read_file, write_file


class Cache:
    """A folder of entries; each is some tensors by name.

    Args:
        folder: made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def entry(self, kind: str, *made_of: object) -> Path:
        """The file of an entry.

        Args:
            kind: of the entry; the folder that it stands in.
            made_of: everything that makes a difference.
        """
        digest = hashlib.sha256(repr(made_of).encode()).hexdigest()[:32]
        return self.folder / kind / digest[:2] / f"{digest}.safetensors"

    def write(self, entry: Path, tensors: dict[str, Tensor]) -> None:
        """Writes an entry.

        Raises:
            DeltaConvError: values that are not finite numbers, or a folder that cannot be written.
        """
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DeltaConvError(
                f"cannot write the cache {self.folder} ({error}); choose another with --cache"
            ) from error
        write_file(entry, tensors, {}, numbers=True)


def read(entry: Path) -> dict[str, Tensor]:
    """An entry's tensors, on the CPU.

    Raises:
        DeltaConvError: it is gone or damaged.
    """
    try:
        return read_file(entry, numbers=True)[1]
    except CheckpointError as error:
        raise DeltaConvError(
            f"{entry} in the cache is no longer whole; delete that file, if it is there, and start again"
        ) from error
