"""A file is replaced as a whole or stays as it was, and nothing else is left in its folder."""

from __future__ import annotations

import os

import pytest

from deltaconv_core.util import whole_file
from deltaconv_core.util.whole_file import replacing, write_text


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    return path


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_replaces_a_file(file):
    write_text(file, "new ΔConv")
    assert content(file.parent) == {"file.txt": "new ΔConv"}


def test_old_until_the_end(file):
    with replacing(file) as part:
        part.write_text("new")
        assert (part.parent, file.read_text()) == (file.parent, "old")
    assert content(file.parent) == {"file.txt": "new"}


def test_an_error_leaves_the_old_file_alone(file):
    def fail():
        with replacing(file) as part:
            part.write_text("half")
            raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        fail()
    assert content(file.parent) == {"file.txt": "old"}


def test_a_replacement_that_fails_leaves_the_old_file_alone(file, monkeypatch):
    def full(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write_text(file, "new")
    assert content(file.parent) == {"file.txt": "old"}


def test_writers_of_one_file_do_not_meet(file):
    with replacing(file) as one, replacing(file) as other:
        one.write_text("one")
        other.write_text("other")
    assert content(file.parent) == {"file.txt": "one"}


def test_a_durable_file_is_on_the_disk_before_it_has_its_name(file, monkeypatch):
    steps = []
    flush, replace = whole_file._flush, os.replace
    monkeypatch.setattr(whole_file, "_flush", lambda path: (steps.append(path.suffix), flush(path)))
    monkeypatch.setattr(os, "replace", lambda *paths: (steps.append("replaced"), replace(*paths)))
    with replacing(file, durable=True) as part:
        part.write_text("new")
    assert steps[:2] == [".part", "replaced"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_folder(tmp_path, fails):
    folder = tmp_path / "new"
    try:
        with replacing(folder) as part:
            part.mkdir()
            (part / "a").write_text("a")
            assert not fails
    except AssertionError:
        assert list(tmp_path.iterdir()) == []
    else:
        assert content(folder) == {"a": "a"} and list(tmp_path.iterdir()) == [folder]
