"""The list of published weights: what exists, where it is, how to check it.

`weights_manifest.json` holds the records of this project; `models/deltaconv/manifest.json` may add the
user's own and later ones win by name. Reading the list never opens a connection. Every text in a record is
hostile until it passed the schema (`manifest.schema.json`) and the checks of the classes below.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from ..errors import ManifestError
from ..util.foreign_json import parse_list
from ..util.names import is_device
from ..util.once import Once
from ..util.text import quoted

log = logging.getLogger(__name__)
say = Once(log.warning)

PACKAGE = Path(__file__).resolve().parents[1]
REPOSITORY = PACKAGE.parent
SCHEMA = Path(__file__).with_name("manifest.schema.json")
SUFFIX = ".safetensors"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_HUB_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class HubSource:
    """A file in a model repository of the Hugging Face Hub. `revision` None: the newest."""

    repo: str
    file: str
    revision: str | None = None

    def __post_init__(self) -> None:
        if not _HUB_REPOSITORY.fullmatch(self.repo) or ".." in self.repo:
            raise ManifestError(f"expected a Hub repository such as owner/name, got {self.repo!r}")
        if self.revision is not None and not _COMMIT.fullmatch(self.revision):
            raise ManifestError(
                f"expected a full commit hash of 40 hex digits as revision, got {self.revision!r}"
            )
        _check_relative_file(self.file)

    @property
    def url(self) -> str:
        return f"https://huggingface.co/{self.repo}/resolve/{self.revision or 'main'}/{self.file}"


@dataclass(frozen=True)
class UrlSource:
    """A file at an https address. Whether the address may be used is decided when it is (`fetch.address`)."""

    url: str

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise ManifestError(f"{self.url!r} is not an address: {error}") from None
        if parts.scheme not in ("https", "http") or not host or parts.username is not None:
            raise ManifestError(f"expected an https address without a user name, got {self.url!r}")
        if not self.url.isprintable() or not self.url.isascii() or " " in self.url or "\\" in self.url:
            raise ManifestError(f"expected an address of plain characters, got {self.url!r}")
        if not parts.path.endswith(SUFFIX):
            raise ManifestError(f"expected the address of a {SUFFIX} file, got {self.url!r}")


@dataclass(frozen=True)
class RepositorySource:
    """A file that comes with this repository; `path` is relative to its root."""

    path: str

    def __post_init__(self) -> None:
        _check_relative_file(self.path)


def _check_relative_file(path: str) -> None:
    """Refuse anything but a plain relative path, with forward slashes, of a .safetensors file."""
    parts = path.split("/")
    if not path.isprintable() or "\\" in path or ":" in path or any(p in ("", ".", "..") for p in parts):
        raise ManifestError(f"expected a relative path without '..', '\\' or ':', got {path!r}")
    if PurePosixPath(path).suffix != SUFFIX or any(map(is_device, parts)):
        raise ManifestError(f"expected a {SUFFIX} file, got {path!r}")


@dataclass(frozen=True)
class SpecHints:
    """What the tensors of a file do not show of its blocks' specs; None: not known, or the file says it."""

    gate: str | None = None
    scales: tuple[float, ...] | None = None
    pooling: str | None = None


@dataclass(frozen=True)
class Record:
    """One published file. Fields as in `manifest.schema.json`, but "form" is `hints`, "licence" `license`.

    Raises:
        ManifestError: a name that is not a plain file name, or a hash or size that cannot be one.
    """

    name: str
    title: str
    architecture: str
    base_model: str
    recommended_for: tuple[str, ...]
    source: HubSource | UrlSource | RepositorySource
    size: int | None
    sha256: str | None
    hints: SpecHints
    license: str
    citation: str
    note: str = ""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or is_device(self.name):
            raise ManifestError(f"expected a name of letters, digits, '.', '_' and '-', got {self.name!r}")
        if self.sha256 is not None and not _SHA256.fullmatch(self.sha256):
            raise ManifestError(
                f"expected 64 lower-case hex digits as sha256 of {self.name}, got {self.sha256!r}"
            )
        if self.size is not None and self.size < 1:
            raise ManifestError(f"expected a size in bytes for {self.name}, got {self.size!r}")
        if isinstance(self.source, RepositorySource) and self.sha256 is None:
            raise ManifestError(f"{self.name} lies in the repository, so its sha256 must be given")

    @property
    def filename(self) -> str:
        """The file's name in the model folder."""
        return self.name + SUFFIX

    def local_path(self, folder: Path) -> Path:
        """Where the file is, or will be once fetched into `folder`. Nothing is opened."""
        if isinstance(self.source, RepositorySource):
            return REPOSITORY / self.source.path
        return folder / self.filename

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Record:
        """Build a record from an entry that passed the schema."""
        values = dict(entry)
        hints, license = values.pop("form"), values.pop("licence")
        values["recommended_for"] = tuple(entry["recommended_for"])
        values["source"] = _source_from_json(entry["source"])
        values["hints"] = SpecHints(
            hints["gate"], tuple(hints["scales"]) if hints["scales"] else None, hints["pooling"]
        )
        return cls(**values, license=license)


def _source_from_json(source: Mapping[str, Any]) -> HubSource | UrlSource | RepositorySource:
    if "hub" in source:
        return HubSource(source["hub"], source["file"], source["revision"])
    return UrlSource(source["url"]) if "url" in source else RepositorySource(source["path"])


@dataclass(frozen=True)
class Manifest:
    """Records by name, and what was wrong with the user's own list (`problems`), which never hides the
    others."""

    records: Mapping[str, Record]
    problems: tuple[ManifestError, ...] = field(default=())

    def names(self) -> list[str]:
        return list(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records.values())

    def __getitem__(self, name: str) -> Record:
        if name in self.records:
            return self.records[name]
        known = ", ".join(self.records) or "none"
        raise ManifestError(
            "; ".join([f"no weights called {name!r}; known: {known}", *map(str, self.problems)])
        )

    def recommended(self, architecture: str) -> Record | None:
        """The record that "auto" takes for this architecture: the last one listed that names it; None: no
        such."""
        found = [record for record in self if architecture in record.recommended_for]
        return found[-1] if found else None

    def for_file(self, filename: str) -> Record | None:
        """The record of a file in the model folder, by its file name (subfolders do not count)."""
        return next((record for record in self if record.filename == PurePosixPath(filename).name), None)


def load_manifest(extra: Path | None = None) -> Manifest:
    """Read the built-in list and, where it exists, the user's own.

    Args:
        extra: the user's list; its records replace built-in ones of the same name. A broken record, or a
            broken file, is left out and named in `problems`.

    Raises:
        ManifestError: the built-in list is missing or broken.
    """
    records, problems = _read(builtin_path())
    if problems:
        raise problems[0]
    if extra is not None and os.path.lexists(extra):
        own, problems = _read(extra)
        for problem in problems:
            say(f"left out of the list of weights: {problem}")
        records = {name: record for name, record in records.items() if name not in own} | own
    return Manifest(records, tuple(problems))


def builtin_path() -> Path:
    """weights_manifest.json: inside the package when pip installed it, else at the root of the repository."""
    installed = PACKAGE / "weights_manifest.json"
    return installed if installed.is_file() else REPOSITORY / "weights_manifest.json"


Lists = tuple[dict[str, Record], list[ManifestError]]


class KnownLists:
    """The lists as they were last read, by path; a file that has changed since is read again."""

    def __init__(self) -> None:
        self.lists: dict[Path, tuple[tuple[int, ...], Lists]] = {}

    def reset(self) -> None:
        """As in a new process."""
        self.lists.clear()


known = KnownLists()


def _read(path: Path) -> Lists:
    """The records of a list, and what is wrong with others. An unchanged file is not read again."""
    try:
        stat = path.stat()
    except OSError as error:
        return {}, [ManifestError(f"{path}: not readable as JSON: {error}")]
    stamp = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    before, lists = known.lists.get(path, (None, ({}, [])))
    if before != stamp:
        lists = _parse(path)
        known.lists[path] = stamp, lists
    records, problems = lists
    return dict(records), list(problems)


def _parse(path: Path) -> Lists:
    validator = _validator()
    try:
        entries = parse_list(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        return {}, [ManifestError(f"{path}: not readable as JSON: {error}")]
    records: dict[str, Record] = {}
    problems: list[ManifestError] = []
    for number, entry in enumerate(entries, start=1):
        try:
            if isinstance(entry, ValueError):
                raise ManifestError(entry)
            _check_schema(validator, entry)
            record = Record.from_json(entry)
        except ManifestError as error:
            name = entry.get("name") if isinstance(entry, dict) else None
            problems.append(ManifestError(f"{path}: record {number} ({quoted(name)}): {error}"))
        else:
            records[record.name] = record
    return records, problems


def _check_schema(validator: Any, entry: object) -> None:
    error = next(
        iter(sorted(validator.iter_errors(entry), key=lambda e: list(map(str, e.absolute_path)))), None
    )
    if error is not None:
        place = "/".join(map(str, error.absolute_path))
        raise ManifestError(f"{place}: {error.message[:300]}" if place else error.message[:300])


@cache
def _validator() -> Any:
    """Validator of one record. jsonschema is imported here, where it is used."""
    try:
        from jsonschema import Draft202012Validator
    except ImportError:
        raise ManifestError("reading the weights manifest needs jsonschema: pip install jsonschema") from None
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    return Draft202012Validator({"$ref": "#/$defs/record", "$defs": schema["$defs"]})
