"""Drawings of workflows."""

from __future__ import annotations

import sys

import pytest

from scripts import workflow

pytest.importorskip("matplotlib")

from scripts import thumbnails


def test_draws_the_workflows_whose_runs_it_does_not_show(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["thumbnails.py", "--output", str(tmp_path)])
    thumbnails.main()
    files = workflow.FOLDER.glob("*.json")
    assert {file.stem for file in tmp_path.iterdir()} == {file.stem for file in files} - {*thumbnails.SHOWN}
    assert all(file.read_bytes().startswith(b"\xff\xd8\xff") for file in tmp_path.iterdir())
