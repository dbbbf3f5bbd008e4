"""The list of weights: what it holds, what it refuses, and how the user's own list is added."""

from __future__ import annotations

import copy
import json
import socket
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from deltaconv_core import ManifestError
from deltaconv_core.weights import manifest as module
from deltaconv_core.weights.manifest import (
    HubSource,
    RepositorySource,
    UrlSource,
    builtin_path,
    load_manifest,
)

GOOD: dict[str, Any] = {
    "name": "mine",
    "title": "Mine",
    "architecture": "sd15",
    "base_model": "some model",
    "recommended_for": [],
    "source": {"url": "https://example.com/w/mine.safetensors"},
    "size": 1000,
    "sha256": "0" * 64,
    "form": {"gate": "simple", "scales": [1, 0.5], "pooling": "average"},
    "licence": "MIT",
    "citation": "nobody",
}
PUBLISHED = [
    f"ConvFusion-{m}-{d}" for m in ("sd15", "sdxl", "pixart512", "pixart1024") for d in ("mjv5", "laion")
]


def schema() -> Any:
    return json.loads(module.SCHEMA.read_text(encoding="utf-8"))


def changed(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(GOOD), **changes}


def write(folder: Path, entries: Any) -> Path:
    path = folder / "manifest.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries), encoding="utf-8")
    return path


def test_the_schema_is_one_and_the_built_in_list_follows_it() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    entries = json.loads(builtin_path().read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema()).validate(entries)
    names = [entry["name"] for entry in entries]
    assert len(set(names)) == len(names)


def test_the_authors_files_are_listed_with_what_is_known_and_no_more() -> None:
    manifest = load_manifest()
    assert set(PUBLISHED) <= set(manifest.names())
    for name in PUBLISHED:
        record = manifest[name]
        assert record.source == HubSource("7eu7d7/ConvFusion", f"{name}.safetensors")
        assert (record.size, record.sha256, record.license) == (None, None, "not stated by the authors")
        assert "bc62c86" in record.note
        assert (
            manifest.for_file(record.filename)
            == manifest.for_file(f"some/folder/{name}.safetensors")
            == record
        )
    assert manifest["ConvFusion-pixart1024-laion"].hints.scales is None
    assert manifest["ConvFusion-sdxl-mjv5"].hints == module.SpecHints("simple", (1, 0.5), "average")


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("sd15", "ConvFusion-sd15-mjv5"),
        ("sdxl", "ConvFusion-sdxl-mjv5"),
        ("pixart_sigma", None),
        ("other", None),
    ],
)
def test_auto_takes_one_record_or_none(architecture: str, name: str | None) -> None:
    record = load_manifest().recommended(architecture)
    assert (record and record.name) == name


def test_the_users_list_adds_and_wins(tmp_path: Path) -> None:
    own = [
        changed(recommended_for=["sd15"]),
        changed(name="ConvFusion-sd15-laion", title="Replaced"),
    ]
    manifest = load_manifest(write(tmp_path, own))
    assert manifest.problems == ()
    assert set(manifest.names()) == set(load_manifest().names()) | {"mine"}
    assert manifest["ConvFusion-sd15-laion"].title == "Replaced"
    recommended = manifest.recommended("sd15")
    assert recommended is not None and recommended.name == "mine"


def test_without_a_users_list_there_is_the_built_in_one(tmp_path: Path) -> None:
    assert load_manifest(tmp_path / "manifest.json").names() == load_manifest().names()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{not json", "JSON"),
        ("{}", "expected a list"),
        ("\x00\xff", "JSON"),
        ("[" * 100_000, "JSON"),
        ("[1]", "record 1"),
    ],
    ids=["no json", "no list", "binary", "deep", "no record"],
)
def test_a_broken_users_list_is_told_and_hides_nothing(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    manifest = load_manifest(path)
    assert manifest.names() == load_manifest().names()
    (problem,) = manifest.problems
    assert str(path) in str(problem) and said in str(problem)


def test_a_broken_record_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, [changed(), changed(name="half", sha256="abc"), changed(name="other")])
    manifest = load_manifest(path)
    assert {"mine", "other"} <= set(manifest.names()) and "half" not in manifest.names()
    (problem,) = manifest.problems
    assert all(word in str(problem) for word in (str(path), "record 2", "'half'", "sha256", "abc"))
    with pytest.raises(ManifestError, match="no weights called 'half'.*record 2"):
        manifest["half"]
    load_manifest(path)
    assert caplog.text.count("record 2") == 1


@pytest.mark.parametrize("depth", [70, 400, 100_000])
@pytest.mark.parametrize("field", ["recommended_for", "title", "form", "more"])
def test_a_deep_record_is_left_out_and_no_other(tmp_path: Path, depth: int, field: str) -> None:
    """Whatever looks at a deep value recurses: json, the schema's check of unique items, printing."""
    deep = "[" * depth + "]" * depth
    record = json.dumps(changed(name="deep") | {field: "HERE"}).replace('"HERE"', f"[{deep}, {deep}]")
    path = write(tmp_path, f"[{json.dumps(changed())}, {record}, {json.dumps(changed(name='other'))}]")
    manifest = load_manifest(path)
    assert {"mine", "other"} <= set(manifest.names()) and "deep" not in manifest.names()
    (problem,) = manifest.problems
    assert "record 2" in str(problem) and "levels deep" in str(problem)


def test_a_list_that_cannot_be_reached_is_told(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").symlink_to("/mnt/unplugged/manifest.json")
    (problem,) = load_manifest(tmp_path / "manifest.json").problems
    assert "manifest.json: not readable as JSON" in str(problem)
    assert load_manifest(tmp_path / ("x" * 300)).problems == ()


HOSTILE = {
    "name up": {"name": "../mine"},
    "name slash": {"name": "a/b"},
    "name backslash": {"name": "a\\b"},
    "name absolute": {"name": "/etc/passwd"},
    "name hidden": {"name": ".bashrc"},
    "name empty": {"name": ""},
    "name newline": {"name": "mine\n"},
    "name nul": {"name": "mine\x00"},
    "name long": {"name": "m" * 101},
    "name device": {"name": "NUL"},
    "name device with ending": {"name": "com1.x"},
    "name stream": {"name": "mine:stream"},
    "title control": {"title": "\x1b[2J"},
    "sha short": {"sha256": "abc"},
    "sha upper": {"sha256": "A" * 64},
    "sha newline": {"sha256": "0" * 64 + "\n"},
    "size zero": {"size": 0},
    "size text": {"size": "1000"},
    "size bool": {"size": True},
    "unknown field": {"command": "rm"},
    "form field": {"form": {"gate": "simple"}},
    "form gate": {"form": {"gate": "other", "scales": None, "pooling": None}},
    "form scale": {"form": {"gate": None, "scales": [0], "pooling": None}},
    "two sources": {"source": {"url": "https://example.com/a.safetensors", "path": "a.safetensors"}},
    "no source": {"source": {}},
    "url file": {"source": {"url": "file:///etc/a.safetensors"}},
    "url ftp": {"source": {"url": "ftp://example.com/a.safetensors"}},
    "url pickle": {"source": {"url": "https://example.com/a.ckpt"}},
    "url ending in the query": {"source": {"url": "https://example.com/a.pt?x=.safetensors"}},
    "url password": {"source": {"url": "https://me:secret@example.com/a.safetensors"}},
    "url no host": {"source": {"url": "https:///a.safetensors"}},
    "url port": {"source": {"url": "https://example.com:99999/a.safetensors"}},
    "url newline": {"source": {"url": "https://example.com/\r\nX: y/a.safetensors"}},
    "url bracket": {"source": {"url": "https://[::1/a.safetensors"}},
    "path up": {"source": {"path": "../a.safetensors"}},
    "path up inside": {"source": {"path": "demo/../../a.safetensors"}},
    "path absolute": {"source": {"path": "/etc/a.safetensors"}},
    "path drive": {"source": {"path": "C:/a.safetensors"}},
    "path backslash": {"source": {"path": "..\\a.safetensors"}},
    "path pickle": {"source": {"path": "demo/a.pt"}},
    "path without hash": {"source": {"path": "demo/a.safetensors"}, "sha256": None},
    "hub up": {"source": {"hub": "a/..", "revision": None, "file": "a.safetensors"}},
    "hub three": {"source": {"hub": "a/b/c", "revision": None, "file": "a.safetensors"}},
    "hub file up": {"source": {"hub": "a/b", "revision": None, "file": "../a.safetensors"}},
    "hub file pickle": {"source": {"hub": "a/b", "revision": None, "file": "a.bin"}},
    "hub short revision": {"source": {"hub": "a/b", "revision": "bc62c86", "file": "a.safetensors"}},
    "hub no revision": {"source": {"hub": "a/b", "file": "a.safetensors"}},
}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_record_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    manifest = load_manifest(write(tmp_path, [changed(**changes)]))
    assert len(manifest.problems) == 1
    assert manifest.names() == load_manifest().names()


@pytest.mark.parametrize("field", sorted(GOOD))
def test_every_field_must_be_there(tmp_path: Path, field: str) -> None:
    entry = {key: value for key, value in GOOD.items() if key != field}
    (problem,) = load_manifest(write(tmp_path, [entry])).problems
    assert field in str(problem)


@pytest.mark.parametrize(
    "build",
    [
        lambda: HubSource("a/b", "x/../../y.safetensors"),
        lambda: HubSource("../b", "y.safetensors"),
        lambda: UrlSource("file:///y.safetensors"),
        lambda: RepositorySource("../y.safetensors"),
        lambda: module.Record(**{**vars(load_manifest()["ConvFusion-sd15-mjv5"]), "name": "../x"}),
    ],
)
def test_the_classes_refuse_what_did_not_pass_the_schema(build: Any) -> None:
    with pytest.raises(ManifestError):
        build()


def test_reading_the_list_opens_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert load_manifest().names()


def test_a_broken_built_in_list_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "builtin_path", lambda: tmp_path / "weights_manifest.json")
    with pytest.raises(ManifestError, match="weights_manifest.json"):
        load_manifest()
