"""CONTRIBUTING's map is that of the folders."""

from __future__ import annotations

import re

import pytest

from scripts.comfy_host import REPOSITORY

TEXT = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
TABLES = [re.findall(r"^\| `(\w+)/`", table, re.M) for table in TEXT.split("|---|---|")[1:]]


@pytest.mark.parametrize(("number", "folder"), [(0, "deltaconv_core"), (1, "nodes/host")])
def test_every_room_is_on_the_map(number, folder):
    rooms = [path.parent.name for path in (REPOSITORY / folder).glob("*/__init__.py")]
    assert sorted(TABLES[number]) == sorted(rooms)


def test_rooms_of_the_tests_are_rooms():
    for mirror, folder in (("core", "deltaconv_core"), ("comfyui", "nodes/host")):
        rooms = {path.name for path in (REPOSITORY / "tests" / mirror).iterdir() if path.is_dir()}
        assert rooms - {"__pycache__"} <= {path.name for path in (REPOSITORY / folder).iterdir()}


def test_no_test_module_imports_another_or_changes_the_path():
    wrong = re.compile(r"^\s*(?:(?:from|import) (?:tests\b|test_)|sys\.path(?:\.|\[))", re.M)
    rooms = [REPOSITORY / name for name in ("tests", "testing", "benchmarks")]
    files = [file for room in rooms for file in room.rglob("*.py")]
    assert [str(file) for file in files if wrong.search(file.read_text(encoding="utf-8"))] == []


def test_the_test_kit_leans_on_no_benchmark():
    files = (REPOSITORY / "testing").rglob("*.py")
    wrong = re.compile(r"^\s*(?:from|import) benchmarks\b", re.M)
    assert [str(file) for file in files if wrong.search(file.read_text(encoding="utf-8"))] == []
