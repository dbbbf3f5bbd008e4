"""A run is as sound as its state: the log may be torn, saved again by others, or gone."""

from __future__ import annotations

import json

import pytest
import torch

from deltaconv_core.distill import RunFolder, Settings, check_same_run
from deltaconv_core.distill.run_folder import RUN_KEY, Row, State
from deltaconv_core.errors import CheckpointError, DeltaConvError
from deltaconv_core.weights.safefile import write_file

SETTINGS = Settings()
VALUES = {"settings": SETTINGS.to_dict(), "notes": {"data": "x"}, "optimizer": {}, "scaler": {}}


def rows(*steps):
    return [Row(step, "layers", 1e-3, {"feature": 0.5 + step}, 1.0) for step in steps]


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.save(State(5, {"weights.a": torch.ones(3)}, VALUES), rows(1, 2, 3, 4, 5))
    return run


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (lambda log: log.replace(b",", b";"), []),
        (lambda log: log.replace(b",", b"\t"), []),
        (lambda log: log.replace(b"2,layers", b"2,lay\xffers"), [1, 3, 4, 5]),
        (lambda log: log.replace(b"2,layers,0.001", b"2,layers,0.0x1"), [1, 3, 4, 5]),
        (lambda log: log.replace(b"3,layers", b"3.0,layers"), [1, 2, 4, 5]),
        (lambda log: log[:-9], [1, 2, 3, 4]),
        (lambda log: log.replace(b"4,layers", b"\0,layers"), [1, 2, 3, 5]),
        (lambda log: b"step,x\n" + log.partition(b"\n")[2], [1, 2, 3, 4, 5]),
        (lambda log: log.partition(b"\n")[2], [1, 2, 3, 4, 5]),
        (lambda log: b"\xef\xbb\xbf" + log, [1, 2, 3, 4, 5]),
        (lambda log: log.replace(b"\r\n", b"\r\n\r\n"), [1, 2, 3, 4, 5]),
        (lambda log: log + b'6,"layers', [1, 2, 3, 4, 5]),
        (lambda log: log.replace(b",0.001,1.5,", b",0.001,,"), [2, 3, 4, 5]),
        (lambda log: b"", []),
        (lambda log: b"\xff\xfe" * 100, []),
        (lambda log: b"x" * 300_000, []),
    ],
)
def test_rows_that_cannot_be_read_are_left_out(run, caplog, damage, left):
    run.log_file.write_bytes(damage(run.log_file.read_bytes()))
    state, found = run.load()
    assert state.step == 5 and torch.equal(state.tensors["weights.a"], torch.ones(3))
    assert [row.step for row in found] == left and found == rows(*left)
    told = caplog.text.count("cannot be read and are left out")
    assert told <= 1 and (told == 1 or len(left) == 5 or not left)
    caplog.clear()
    assert run.load()[1] == found and not caplog.text  # said once: the rows are gone


def test_a_torn_row_does_not_take_the_next_one_along(run):
    """The disk is full in the middle of a row; a later save of the same process succeeds."""
    run.log_file.write_bytes(run.log_file.read_bytes() + b"6,layers,0.0")
    run.save(State(7, {"weights.a": torch.ones(3)}, VALUES), rows(6, 7))
    assert [row.step for row in run.load()[1]] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("log", ["gone", "folder"])
def test_a_log_that_is_not_there(run, log):
    run.log_file.unlink()
    if log == "folder":
        run.log_file.mkdir()
        assert run.read_log() == []
    else:
        assert run.load()[1] == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("settings", value) for value in (None, [], {"layer_steps": "x"}, {"more": 1})),
        *(("notes", value) for value in (None, 5)),
        *(("step", value) for value in ("5", -1, True, 1e9, [])),
        *(("format", value) for value in ("x" * 10_000, None)),
    ],
)
def test_values_that_cannot_be(run, name, value):
    """Whoever reads the state gets one error that names the file."""
    text = json.dumps({"format": 1, "step": 5, **VALUES} | {name: value})
    write_file(run.state_file, {}, {RUN_KEY: text})
    with pytest.raises(DeltaConvError, match=r"state\.safetensors|setting|expected layer_steps") as caught:
        check_same_run(run, SETTINGS, {})
    assert len(str(caught.value)) <= 2000


@pytest.mark.parametrize("text", ["", "[]", "null", "5", "[" * 900 + "]" * 900, '{"step": 1}', "{"])
def test_headers_that_are_no_state(run, text):
    write_file(run.state_file, {}, {RUN_KEY: text})
    for read in (run.values, run.load):
        with pytest.raises(CheckpointError, match="is not the state of a distillation run"):
            read()
