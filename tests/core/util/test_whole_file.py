"""A file is replaced as a whole or stays as it was, and nothing else is left in its folder."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from deltaconv_core.util import whole_file
from deltaconv_core.util.lock import held
from deltaconv_core.util.whole_file import release, replacing, reserve, write_text


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


# ---- what a killed process leaves ----


def left(folder, name, days):
    part = folder / name
    part.write_text("half")
    then = time.time() - days * 24 * 3600
    os.utime(part, (then, then))
    return part


def test_parts_that_nobody_writes_any_more_are_swept(tmp_path):
    old = [left(tmp_path, f".{name}.0123abcd.part", 1.1) for name in ("mine.txt", "log.csv")]
    folder = left(tmp_path, ".hub.89abcdef.part", 1.1)
    folder.unlink()
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    os.utime(folder, (0, 0))
    kept = [
        left(tmp_path, ".mine.safetensors.0123abcd.part", 0.9),
        left(tmp_path, "mine.safetensors.part", 9),  # a fetch that can be resumed
        left(tmp_path, ".mine.safetensors.lock", 9),
        left(tmp_path, ".mine.part", 9),
    ]
    write_text(tmp_path / "other.txt", "new")
    assert not any(part.exists() for part in [*old, folder])
    assert all(part.exists() for part in kept)


def test_parts_stay_while_somebody_writes_in_the_folder(tmp_path):
    part = left(tmp_path, ".mine.0123abcd.part", 2)
    with replacing(tmp_path / "slow") as slow:
        part = left(tmp_path, ".mine.0123abcd.part", 2)
        slow.write_text("new")
        write_text(tmp_path / "other.txt", "new")
        assert part.exists() == (os.name == "posix")
    write_text(tmp_path / "other.txt", "new")
    assert not part.exists()


def test_a_process_that_is_killed_while_it_writes(tmp_path):
    """At many moments: the file is the old or the new one, and a day later its part is gone."""
    file = tmp_path / "numbers.txt"
    code = (
        "import itertools, sys; from pathlib import Path\n"
        "from deltaconv_core.util.whole_file import write_text\n"
        "for n in itertools.count(): write_text(Path(sys.argv[1]), str(n) * 200_000)"
    )
    for moment in range(6):
        with subprocess.Popen([sys.executable, "-c", code, str(file)], env={**os.environ}) as process:
            while not file.exists() and process.poll() is None:
                time.sleep(0.001)
            time.sleep(0.003 * moment)
            process.kill()
        text = file.read_text()
        number = text[: len(text) // 200_000]
        assert text == number * 200_000
    for part in tmp_path.glob(".*.part"):
        os.utime(part, (0, 0))
    write_text(tmp_path / "next.txt", "new")
    assert {path.name for path in tmp_path.iterdir()} == {"numbers.txt", "next.txt"}


# ---- names ----


def test_a_name_is_kept_until_it_is_released(tmp_path):
    path = tmp_path / "mine"
    assert reserve(path) and not reserve(path)
    release(path)
    assert reserve(path)
    path.write_text("saved")
    release(path)
    assert not reserve(path) and content(tmp_path) == {"mine": "saved"}
    release(path)
    with pytest.raises(OSError, match="missing"):
        reserve(tmp_path / "missing" / "mine")


def test_of_many_at_one_moment_one_gets_the_name(tmp_path):
    with ThreadPoolExecutor(8) as threads:
        for number in range(50):
            path = tmp_path / str(number)
            assert sum(threads.map(lambda _, path=path: reserve(path), range(8))) == 1


# ---- locks ----


def test_a_lock_is_held_by_one(tmp_path):
    lock = tmp_path / "lock"
    with (
        held(lock, 0),
        pytest.raises(TimeoutError, match=rf"held by process {os.getpid()} on"),
        held(lock, 0.05),
    ):
        pass
    with held(lock, 0):
        pass
    assert content(tmp_path) == {}


def test_many_take_a_lock_by_turns(tmp_path):
    lock, inside, most = tmp_path / "lock", [], []

    def one(_):
        with held(lock, 20):
            inside.append(1)
            most.append(len(inside))
            inside.pop()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(one, range(200)))
    assert most == [1] * 200 and content(tmp_path) == {}


def test_a_killed_process_holds_no_lock(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from deltaconv_core.util.lock import held\n"
        "with held(Path(sys.argv[1]), 0):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    lock = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(TimeoutError, match=f"process {process.pid} on"), held(lock, 0):
            pass
        process.kill()
    with held(lock, 0):
        pass
