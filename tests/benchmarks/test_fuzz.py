"""Hostile inputs, a few of them; and that the command sees what is not as it should be."""

from __future__ import annotations

import os

import pytest

from benchmarks.fuzz.__main__ import main
from benchmarks.fuzz.kinds import KINDS
from deltaconv_core.errors import DeltaConvError


def test_two_thousand_inputs(capsys):
    pytest.importorskip("diffusers")
    assert main(["--inputs", "2000", "--seed", "1"]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert all(f"| {kind} " in printed for kind in KINDS)


def foreign(random, folder):
    raise KeyError("x")


def long_message(random, folder):
    error = DeltaConvError("x")
    error.args = ("x" * 5000,)
    raise error


def writes_elsewhere(random, folder):
    (folder.parent / "beside").write_text("x")


def makes_a_folder_elsewhere(random, folder):
    (folder / ".." / "beside").mkdir(exist_ok=True)


def starts_a_program(random, folder):
    os.system("true")


@pytest.mark.parametrize(
    ("reader", "said"),
    [
        (foreign, "KeyError in test_fuzz.py:foreign"),
        (long_message, "a message of more than"),
        (writes_elsewhere, "beside"),
        (makes_a_folder_elsewhere, "os.mkdir"),
        (starts_a_program, "os.system"),
    ],
)
def test_what_is_not_as_it_should_be_is_told(monkeypatch, capsys, reader, said):
    monkeypatch.setitem(KINDS, "names", reader)
    assert main(["--kinds", "names", "--inputs", "3"]) == 1
    told = capsys.readouterr().err
    assert "unexpected: " in told and said in told and "try names/0" in told


def test_the_same_seed_makes_the_same_inputs(monkeypatch, capsys):
    seen: list[float] = []
    monkeypatch.setitem(KINDS, "names", lambda random, folder: seen.append(random.random()))
    main(["--kinds", "names", "--inputs", "3"])
    main(["--only", "names/2"])
    main(["--kinds", "names", "--inputs", "3", "--seed", "5"])
    assert seen[2] == seen[3] and len(set(seen)) == 6
