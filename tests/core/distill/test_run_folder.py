"""A run folder in any state: resumed, or refused in the project's own words."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import deltaconv_core
from deltaconv_core.distill import RunFolder, Settings, distill, is_finished
from deltaconv_core.distill.run_folder import RUN_KEY, Row, State
from deltaconv_core.errors import DeltaConvError
from testing.tiny_network import batches, make_mixers, make_network

SETTINGS = {"layer_steps": 2, "warmup": 0, "save_every": 1}


def train(folder, steps, **options):
    """Trains the tiny network for so many steps in all; returns (result, weights)."""
    network = make_network()
    mixers = make_mixers(network)
    settings = Settings(output_steps=steps - 2, **SETTINGS)
    result = distill(network, mixers, batches, settings, RunFolder(folder), **options)
    return result, {f"{id}.{n}": p.detach() for id, m in mixers.items() for n, p in m.named_parameters()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(files of a run of 4 steps, weights after 6)"""
    folder = tmp_path_factory.mktemp("run")
    train(folder, 4)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files, train(folder, 6)[1]


@pytest.fixture
def folder(run, tmp_path):
    """The run again, to be damaged."""
    for name, content in run[0].items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


LOGS = {
    "semicolons": lambda log: log.replace(b",", b";"),
    "a byte": lambda log: log[:100] + b"\xff" + log[101:],
    "commas in numbers": lambda log: log.replace(b"0.", b"0,"),
    "zeros": lambda log: log[:60] + b"\0" * 20 + log[80:],
    "torn": lambda log: log[:-9],
    "without its head": lambda log: log.partition(b"\n")[2],
    "empty": lambda log: b"",
    "quotes": lambda log: log.replace(b"layer", b'"layer'),
    "another program's": lambda log: b"\xff\xfes\0t\0e\0p\0",
    "one long line": lambda log: b"1," * 200_000,
}


@pytest.mark.parametrize("damage", LOGS.values(), ids=LOGS)
def test_the_state_alone_decides(run, folder, damage, caplog):
    log = folder / "log.csv"
    log.write_bytes(damage(log.read_bytes()))
    result, weights = train(folder, 6)
    assert result.step == 6 and same(weights, run[1])
    assert [row.step for row in result.rows][-2:] == [5, 6]
    assert caplog.text.count("cannot be read") <= 1
    assert [row.step for row in RunFolder(folder).read_log()] == [row.step for row in result.rows]


def test_lost_lines_are_said_once(folder, caplog):
    log = folder / "log.csv"
    log.write_bytes(log.read_bytes().replace(b",", b";"))
    train(folder, 6)
    assert caplog.text.count("cannot be read and are left out") == 1


def test_a_row_torn_by_a_full_disk_does_not_spoil_the_next(tmp_path):
    folder = RunFolder(tmp_path)
    rows = [Row(n, "layer-wise", 1e-4, {"feature": 0.5}, 1.0) for n in range(1, 5)]
    state = {"weights.a": torch.zeros(3)}
    folder.save(State(2, state), rows[:2])
    with folder.log_file.open("ab") as file:
        file.write(b"3,layer-wi")
    folder.save(State(4, state), rows[2:])
    assert folder.load()[1] == rows


def damaged_header(change):
    def damage(folder):
        file = folder / "state.safetensors"
        with safe_open(file, "pt") as opened:
            header = json.loads(opened.metadata()[RUN_KEY])
        changed = change(header)
        text = changed if isinstance(changed, str) else json.dumps(header if changed is None else changed)
        save_file(load_file(file), file, {RUN_KEY: text})

    return damage


def put(name, value):
    return damaged_header(lambda header: header.__setitem__(name, value))


def damaged_tensors(change):
    def damage(folder):
        file = folder / "state.safetensors"
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata)

    return damage


def first(tensors, part):
    return next(name for name in sorted(tensors) if name.startswith(part))


def without(part):
    return damaged_tensors(lambda tensors: tensors.pop(first(tensors, part)))


def instead(part, tensor):
    return damaged_tensors(lambda tensors: tensors.__setitem__(first(tensors, part), tensor))


STATES = {
    "a list": damaged_header(lambda header: []),
    "a number": damaged_header(lambda header: 7),
    "not JSON": damaged_header(lambda header: "{"),
    "deep": damaged_header(lambda header: "[" * 50_000),
    **{
        f"{name} {value!r}": put(name, value)
        for name in ("step", "format", "settings", "notes", "optimizer", "scaler")
        for value in (None, "x", [1], -1, True)
        if not (name == "format" and value is True)
    },
    "settings of texts": put("settings", {"layer_steps": "many"}),
    "optimizer of texts": put("optimizer", {"x.y": 1}),
    "without weights": without("weights."),
    "without average": without("average."),
    "without moments": without("optimizer.0.exp_avg"),
    "another weight": instead("weights.", torch.zeros(2)),
    "another average": instead("average.", torch.zeros(2)),
    "another moment": instead("optimizer.0.exp_avg", torch.zeros(2)),
    "integers": instead("optimizer.0.exp_avg_sq", torch.zeros(2, dtype=torch.int64)),
    "a stranger": damaged_tensors(lambda tensors: tensors.__setitem__("stranger", torch.zeros(1))),
    "a far parameter": damaged_tensors(lambda t: t.__setitem__("optimizer.999.step", torch.zeros(()))),
}


@pytest.mark.parametrize("damage", STATES.values(), ids=STATES)
def test_a_damaged_state_is_refused_and_kept(folder, damage):
    damage(folder)
    before = (folder / "state.safetensors").read_bytes()
    with pytest.raises(DeltaConvError):
        train(folder, 6)
    assert (folder / "state.safetensors").read_bytes() == before
    is_finished(RunFolder(folder), Settings(output_steps=2, **SETTINGS), {})  # never fails


def test_bytes_changed_at_random(run, tmp_path):
    """Resumed, or refused in the project's own words."""
    logging.disable(logging.WARNING)
    choose = random.Random(0)
    resumed = 0
    try:
        for number in range(60):
            folder = tmp_path / str(number)
            folder.mkdir()
            for name, content in run[0].items():
                changed = bytearray(content)
                head = 8 + int.from_bytes(content[:8], "little") if name.startswith("state") else len(content)
                for _ in range(choose.choice((0, 1, 3))):
                    changed[choose.randrange(head)] = choose.randrange(256)
                if choose.random() < 0.1:
                    changed = changed[: choose.randrange(len(changed))]
                (folder / name).write_bytes(changed)
            try:
                train(folder, 5)
                resumed += 1
            except DeltaConvError:
                pass
    finally:
        logging.disable(logging.NOTSET)
    assert 0 < resumed < 60


# ---- one at a time ----


HOLDS = """
import sys
from deltaconv_core.distill import RunFolder
with RunFolder(sys.argv[1]).in_use():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_do_not_train_one_run(folder):
    root = Path(deltaconv_core.__file__).parents[1]
    command = [sys.executable, "-c", HOLDS, str(folder)]
    with subprocess.Popen(
        command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(DeltaConvError, match=rf"is being trained by process {holder.pid} on .* since"):
            train(folder, 6)
        holder.communicate()
    assert holder.returncode == 0
    assert train(folder, 6)[0].step == 6
    assert {path.name for path in folder.iterdir()} == {"state.safetensors", "log.csv"}


def test_a_run_that_learns_nothing_leaves_no_folder(tmp_path):
    def stop(number):
        raise KeyboardInterrupt

    network = make_network()
    settings = Settings(output_steps=1, **SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        distill(network, make_mixers(network), stop, settings, RunFolder(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


# ---- finished runs ----


def test_finished_is_to_the_end_with_the_same(folder):
    run = RunFolder(folder)
    assert is_finished(run, Settings(output_steps=2, **SETTINGS), {})
    assert is_finished(run, Settings(output_steps=2, **SETTINGS | {"save_every": 7}), {})
    for changes in ({"output_steps": 3}, {"output_steps": 1}, {"output_steps": 2, "seed": 1}):
        assert not is_finished(run, Settings(**SETTINGS | changes), {})
    assert not is_finished(run, Settings(layer_steps=1, output_steps=3, warmup=0), {})
    assert not is_finished(run, Settings(output_steps=2, **SETTINGS), {"teacher": "another"})


@pytest.mark.parametrize("damage", ["NaN", "cut", "a text"])
def test_a_finished_run_whose_tensors_are_damaged_is_not_finished(folder, damage):
    """Otherwise every new run like it would take the damaged state over, and fail."""
    settings, run = Settings(output_steps=2, **SETTINGS), RunFolder(folder)
    assert is_finished(run, settings, {})
    content = bytearray(run.state_file.read_bytes())
    if damage == "NaN":
        content[-4:] = b"\xff" * 4
    run.state_file.write_bytes(content[:-4] if damage == "cut" else content)
    if damage == "a text":
        run.state_file.write_text("x" * 1000)
    assert not is_finished(run, settings, {})
