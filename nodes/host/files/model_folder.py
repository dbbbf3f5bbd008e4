"""The model folder `models/deltaconv`: what can be chosen there, and where the chosen file is."""

from __future__ import annotations

import logging
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch

from ....deltaconv_core.errors import DeltaConvError, ManifestError
from ....deltaconv_core.util.free_path import free_path
from ....deltaconv_core.util.text import listing, quoted
from ....deltaconv_core.weights.checkpoint import Checkpoint, read_checkpoint
from ....deltaconv_core.weights.fetch import resolve
from ....deltaconv_core.weights.manifest import (
    Manifest,
    Record,
    RepositorySource,
    SpecHints,
    load_manifest,
)

FOLDER = "deltaconv"
RECOMMENDED = "auto"
MEGABYTE = 1 << 20
SHOWN_NAMES = 20  # names in a message

log = logging.getLogger(__name__)


def register() -> None:
    """Adds the folder to ComfyUI's, after those that extra_model_paths.yaml may have given it."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    # A new folder starts with no extensions, which ComfyUI reads as "any file".
    folder_paths.folder_names_and_paths[FOLDER] = (paths, set(extensions) | {".safetensors"})


class Choices:
    """What can be chosen now: the files in the folder, then published weights that are not there yet.

    Both are read once, so everything that one operation asks gets answers that fit together.
    """

    def __init__(self) -> None:
        self.folders = [Path(path) for path in folder_paths.get_folder_paths(FOLDER)]
        self.manifest = _manifest(self.folders[0])

    @cached_property
    def files(self) -> list[str]:
        """Those in the folder, by their paths in it."""
        return list(folder_paths.get_filename_list(FOLDER))

    def names(self) -> list[str]:
        """What the user can choose, by file name."""
        return self.files + [r.filename for r in self.manifest if r.filename not in self.files]

    def recommended(self, architecture: str) -> str:
        """What "auto" stands for.

        Raises:
            DeltaConvError: no published weights are recommended for this architecture.
        """
        record = self.manifest.recommended(architecture)
        if record is None:
            raise DeltaConvError(
                f"no published weights are recommended for {architecture}; choose a file in `weights` "
                f"(put it into {self.folders[0]}) or connect `deltaconv`"
            )
        return record.filename

    def check(self, name: str) -> None:
        """Refuses what is not one of the choices, such as a path that leads out of the folder.

        Raises:
            DeltaConvError: with what there is to choose from.
        """
        if name not in self.names():
            raise DeltaConvError(
                f"{quoted(name)} is neither a file in the model folder ({self._where}) nor published "
                f"weights; known are: {listing(self.names(), SHOWN_NAMES)}"
            )
        if name in self.files and folder_paths.get_full_path(FOLDER, name) is None:
            raise DeltaConvError(
                f"{name} is in the model folder ({self._where}), but cannot be reached: it is a link to a "
                "file that is not there (a disk that is not mounted?), or was taken away since the list was "
                "made; choose another, or reload the page"
            )

    def load(self, name: str) -> Checkpoint:
        """Reads chosen weights; published ones are checked, and fetched first where they are not there yet.

        Raises:
            DeltaConvError: no such choice, or a file that cannot be fetched or read.
        """
        self.check(name)
        path, record = folder_paths.get_full_path(FOLDER, name), self.manifest.for_file(name)
        if record is not None and path and isinstance(record.source, RepositorySource):
            record = None  # the user's own file, which has the name of one that comes with the repository
        if record is not None:
            path = _fetch(record, Path(path).parent if path else self.folders[0])
        # Nodes run in inference mode, and tensors made there can never take part in training.
        with torch.inference_mode(False):
            return read_checkpoint(path, record.hints if record else SpecHints())

    def fingerprint(self, name: str) -> list[Any]:
        """Changes whenever a file changes that the choice may lead to; "auto" may lead to any."""
        return [
            name,
            *(_stamp(self._present(file)) for file in (self.names() if name == RECOMMENDED else [name])),
        ]

    @property
    def _where(self) -> str:
        return ", ".join(map(str, self.folders))

    def _present(self, name: str) -> Path | None:
        """The chosen file, if it is on this machine."""
        if path := folder_paths.get_full_path(FOLDER, name):
            return Path(path)
        record = self.manifest.for_file(name)
        path = record and record.local_path(self.folders[0])
        return path if path and os.path.isfile(path) else None


def refusal(name: str | None) -> str:
    """What `Choices.check` says, if anything, for ComfyUI's check of a prompt; a linked input is None."""
    try:
        if name not in (None, RECOMMENDED):
            Choices().check(name)
    except DeltaConvError as error:
        return str(error)
    return ""


def path_to_save(name: str) -> Path:
    """Where new weights of this name are to be saved, as `free_path` gives it."""
    return free_path(Path(folder_paths.get_folder_paths(FOLDER)[0]), name, ".safetensors")


def _stamp(path: Path | None) -> tuple[Any, ...]:
    if path is None:
        return ()
    try:
        stat = path.stat()
    except OSError:  # taken away meanwhile; what reads it says so
        return ()
    return str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _fetch(record: Record, folder: Path) -> Path:
    bar: comfy.utils.ProgressBar | None = None

    def progress(done: int, total: int | None) -> None:
        nonlocal bar
        if total:
            bar = bar or comfy.utils.ProgressBar(max(1, total // MEGABYTE))
            bar.update_absolute(done // MEGABYTE)

    interrupted = comfy.model_management.throw_exception_if_processing_interrupted
    return resolve(record, folder, progress=progress, cancelled=interrupted)


def _manifest(folder: Path) -> Manifest:
    try:
        return load_manifest(folder / "manifest.json")
    except ManifestError as error:
        # The files in the folder can be used all the same.
        log.warning("ΔConv: the list of published weights cannot be read: %s", error)
        return Manifest({})
