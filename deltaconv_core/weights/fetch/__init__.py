"""From a record of the manifest to a checked file on disk, fetched when it is not there.

A file gets its name only after its size, hash and header were checked. Until then it is
`<name>.safetensors.part` in the same folder, and whatever ends a fetch early (a cut, the user, kill -9)
leaves that part for the next one to resume. A file that is there is checked and used without opening a
connection.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from ...errors import FetchError
from ..manifest import REPOSITORY, HubSource, Record, RepositorySource, UrlSource
from . import https, hub
from .background import Cancelled, Progress, watch
from .part import Part
from .turns import locked
from .verify import read_pin, verify

__all__ = ["resolve"]

log = logging.getLogger(__name__)


def resolve(
    record: Record, folder: Path, *, progress: Progress | None = None, cancelled: Cancelled | None = None
) -> Path:
    """The local, checked file of a record; fetched into `folder` when it is not there.

    Args:
        record: what to fetch; one whose source lies in the repository is used in place.
        folder: the model folder, made when missing.
        progress: called from the caller's thread with (bytes done, bytes in all or None).
        cancelled: called from the caller's thread about ten times a second; returns True, or raises, to
            stop at once. The part is kept.

    Raises:
        FetchError: the file cannot be fetched or is not what the record promises. The text names the address,
            the folder for a file placed by hand, and the size and hash that are expected.
    """
    path = record.local_path(folder)

    def check() -> None:
        if cancelled is not None and cancelled():
            raise FetchError("stopped by the user; what has arrived is kept and the next fetch resumes there")

    if isinstance(record.source, RepositorySource):
        _check_inside_repository(record, path)
        verify(path, record, check=check)
        return path
    try:
        if path.is_file():
            verify(path, record, check=check)
        else:
            _fetch(record, record.source, path, progress, check)
    except ImportError as error:
        raise FetchError(f"fetching needs {error.name}: pip install {error.name}") from error
    except (FetchError, OSError) as error:
        raise FetchError(f"{record.name}: {error}. {_by_hand(record, record.source, folder)}") from error
    return path


def _check_inside_repository(record: Record, path: Path) -> None:
    if not path.resolve().is_relative_to(REPOSITORY.resolve()):
        raise FetchError(f"{record.name}: {path} leads out of the repository; correct the manifest")
    if not path.is_file():
        raise FetchError(
            f"{record.name} comes with the repository, but {path} is not there; "
            "get the whole repository (git clone, or ComfyUI-Manager)"
        )


def _by_hand(record: Record, source: HubSource | UrlSource, folder: Path) -> str:
    size = f"{record.size} bytes" if record.size else "not known"
    return (
        f"To place it by hand, download {source.url} and put it into {folder.absolute()} "
        f"as {record.filename} (expected size: {size}; sha256: {record.sha256 or 'not known'})"
    )


def _fetch(
    record: Record,
    source: HubSource | UrlSource,
    path: Path,
    progress: Progress | None,
    check: Callable[[], None],
) -> None:
    """Fetch under a lock, so that two ComfyUI processes make one download."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path, check):
        if path.is_file():
            verify(path, record, check=check)
            return
        log.info("fetching %s from %s into %s", record.name, source.url, path.parent)
        with Part(path.with_name(path.name + ".part")) as part:
            known = record.sha256 or read_pin(path)
            promised = watch(lambda: _transfer(source, part, record.size, known), part, progress, check)
            try:
                verify(part.path, record, final=path, promised=promised, check=check)
            except FetchError:
                part.restart("")  # these bytes are wrong; there is nothing to resume
                raise
            part.flush()
        os.replace(part.path, path)
        part.forget()
    log.info("fetched %s", path)


def _transfer(source: HubSource | UrlSource, part: Part, size: int | None, sha256: str | None) -> str | None:
    """Bring the bytes into the part. Returns the sha256 that the source itself states, where it does."""
    if isinstance(source, HubSource):
        return hub.download(source, part, size, sha256)
    https.download(source.url, part, size, sha256)
    return None
