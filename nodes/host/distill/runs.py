"""Distillation runs on disk: `deltaconv_runs/<name>` in ComfyUI's output folder."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import folder_paths

from ....deltaconv_core.distill import RunFolder, Settings, is_finished
from ....deltaconv_core.errors import DeltaConvError
from ....deltaconv_core.util.free_path import free_path
from ....deltaconv_core.util.whole_file import release

NEW = "new run"


def runs_folder() -> Path:
    return Path(folder_paths.get_output_directory()) / "deltaconv_runs"


def choices() -> list[str]:
    """A new run, then the runs that can be resumed, the last changed first."""
    states = [state for state in runs_folder().rglob("state.safetensors") if os.path.isfile(state)]
    found = {state.parent: os.path.getmtime(state) for state in states}
    names = sorted(found, key=lambda path: (-found[path], path))
    return [NEW, *(path.relative_to(runs_folder()).as_posix() for path in names)]


def open_run(resume: str, name: str) -> RunFolder:
    """The run to resume, or the folder of a new one, made at once so that no other run takes it.

    Raises:
        DeltaConvError: no such run, or a name that cannot be one.
    """
    if resume != NEW:
        check_run(resume)
        return RunFolder(runs_folder() / resume)
    path = free_path(runs_folder(), name)
    try:
        path.mkdir()
    except OSError as error:
        raise DeltaConvError(
            f"cannot make the folder {path} of the run ({error}); free some space"
        ) from error
    finally:
        release(path)
    return RunFolder(path)


def finished(name: str, settings: Settings, notes: Mapping[str, str]) -> RunFolder | None:
    """The last run of this name that was trained to its end with these settings and notes.

    ComfyUI drops results from its cache when memory is short; the next prompt would train from the start.
    """
    for found in choices()[1:]:
        folder = RunFolder(runs_folder() / found)
        if re.fullmatch(re.escape(name.strip()) + r"_\d{5}", found) and is_finished(folder, settings, notes):
            return folder
    return None


def check_run(resume: str) -> None:
    """Refuses what is not one of the choices, such as a path that leads out of the folder.

    Raises:
        DeltaConvError: with what there is to choose from.
    """
    if resume not in choices():
        raise DeltaConvError(
            f"there is no run {resume!r} to resume in {runs_folder()}; there are: {', '.join(choices())}"
        )
