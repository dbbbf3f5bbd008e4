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
