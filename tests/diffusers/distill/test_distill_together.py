"""Several processes: they train what one would, stop when one of them is gone, and resume."""

from __future__ import annotations

import shutil
import signal

import pytest

from testing.distill_command import distil, draw, same, save_pipeline, together, weights

pytestmark = pytest.mark.slow  # each of them starts processes


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A teacher, pictures, and a cache that all runs share."""
    folder = tmp_path_factory.mktemp("together")
    return {
        "model": save_pipeline("sd", folder / "model"),
        "data": draw(folder / "data"),
        "cache": folder / "cache",
        "caption_dropout": 0.5,
        "accumulation": 2,
        "batch_size": 4,
        "layer_steps": 3,
        "output_steps": 3,
        "learning_rate": 1e-3,
        "save_every": 2,
    }


@pytest.fixture(scope="module")
def alone(job, tmp_path_factory):
    """The run of one process."""
    output = tmp_path_factory.mktemp("alone")
    assert distil(**job, output=output) == 0
    return output


def run(count, folder, **options):
    """Exit statuses and texts of processes that train together."""
    ranks = together(count, folder, **options)
    return [rank.end() for rank in ranks]


@pytest.fixture(scope="module")
def pair(job, tmp_path_factory):
    """The run of two processes."""
    output = tmp_path_factory.mktemp("pair")
    assert [code for code, _ in run(2, output, **job, output=output)] == [0, 0]
    return output


def largest_difference(first, second):
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_two_processes_train_what_one_does(alone, pair):
    assert largest_difference(alone, pair) < 1e-5
    logs = [
        [[float(x) for x in line.split(",")[2:] if x] for line in (f / "log.csv").read_text().split()[3:]]
        for f in (alone, pair)
    ]
    for one, two in zip(*logs, strict=True):
        assert one == pytest.approx(two, rel=1e-4)


def test_they_really_trained(job, alone, tmp_path):
    assert distil(**job | {"layer_steps": 1, "output_steps": 0}, output=tmp_path) == 0
    assert largest_difference(alone, tmp_path) > 1e-4


def test_one_that_is_killed_stops_the_others_and_they_go_on(job, tmp_path):
    """Bit by bit, on as many processes; and on another number of them."""
    output, whole = tmp_path / "stopped", tmp_path / "whole"
    job = job | {"decay": 0}  # so that the rate does not depend on the number of steps
    ranks = together(2, tmp_path, **job | {"output_steps": 10_000}, output=output)
    ranks[0].wait_for(output / "deltaconv.safetensors")
    ranks[1].kill()
    code, text = ranks[0].end(60)
    assert code == 2, text
    last = text.strip().splitlines()[-1]
    assert last.startswith("error: process 0 of 2 has lost another one") and "start all processes" in last
    assert ranks[1].end()[0] == -signal.SIGKILL

    step = int((output / "log.csv").read_text().split("\n")[-2].split(",")[0])
    assert step >= job["save_every"]
    steps = {"output_steps": step + 2 - job["layer_steps"]}
    shutil.copytree(output, tmp_path / "alone")
    for folder in (output, whole):
        assert [code for code, _ in run(2, tmp_path, **job | steps, output=folder)] == [0, 0]
    assert same(output, whole)
    assert distil(**job | steps, output=tmp_path / "alone") == 0
    assert largest_difference(tmp_path / "alone", whole) < 1e-5


def test_stopping_one_saves_and_ends_all(job, tmp_path):
    output = tmp_path / "run"
    ranks = together(2, tmp_path, **job | {"output_steps": 10_000, "save_every": 1}, output=output)
    ranks[0].wait_for(output / "state.safetensors")  # by then, all of them listen
    ranks[1].kill(signal.SIGTERM)
    ends = [rank.end(60) for rank in ranks]
    assert [code for code, _ in ends] == [130, 130], ends
    assert "Stopped; the run is kept" in ends[0][1] and "Stopped" not in ends[1][1]
    assert (output / "state.safetensors").is_file()


def test_batches_that_cannot_be_shared_out(job, tmp_path):
    cache = tmp_path / "cache"
    ends = run(2, tmp_path, **job | {"batch_size": 3, "cache": cache}, output=tmp_path / "run")
    assert [code for code, _ in ends] == [2, 2]
    assert "batches of 3 pictures cannot be shared out among 2 processes" in ends[0][1]
    assert not (tmp_path / "run").exists() and not cache.exists()
