"""Every workflow has its drawing, and drawing them again gives files of that kind."""

from __future__ import annotations

import sys

import pytest

from comfy_host import REPOSITORY

pytest.importorskip("matplotlib")

import thumbnails


def test_every_workflow_is_drawn_but_the_one_with_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["thumbnails.py", "--output", str(tmp_path)])
    thumbnails.main()
    drawn = {file.stem for file in tmp_path.iterdir()}
    workflows = {file.stem for file in (REPOSITORY / "workflows").glob("*.json")}
    assert drawn == workflows - {"attention_and_deltaconv"}
    assert all(file.read_bytes().startswith(b"\xff\xd8\xff") for file in tmp_path.iterdir())
