"""One command trains every student with equal steps and measures them all."""

import subprocess
from itertools import pairwise
from types import SimpleNamespace

import pytest

from demo.study import compare_students
from demo.study.compare_students import STUDENTS, compare


@pytest.fixture
def commands(monkeypatch):
    """What would have been run: (module, arguments); looking writes its recommendation."""
    made = []

    def run(command, check):
        module, arguments = command[2].removeprefix("demo.study."), command[3:]
        made.append((module, arguments))
        if module == "look":
            folder = compare_students.Path(arguments[arguments.index("--output") + 1])
            folder.mkdir(parents=True)
            (folder / "recommendation.json").write_text('{"a": 3}')
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    return made


def after(arguments, name):
    """The last value of an option, which is the one that counts."""
    return [value for option, value in pairwise(arguments) if option == name][-1]


def test_students_are_trained_alike_and_measured_together(tmp_path, commands):
    teacher = tmp_path / "teacher.safetensors"
    teacher.write_bytes(b"one")
    folder = compare(teacher, tmp_path / "runs", 4, 6)
    assert [module for module, _ in commands] == ["look", *["train_student"] * len(STUDENTS), "evaluate"]
    trained = dict(zip(STUDENTS, (arguments for _, arguments in commands[1:-1]), strict=True))
    for name, arguments in trained.items():
        steps = [after(arguments, f"--{stage}-steps") for stage in ("layer", "output")]
        own = {
            "warm start only": ["0", "0"],
            "hybrid, untrained": ["0", "0"],
            "hybrid, trained": ["400", "600"],
        }
        assert steps == own.get(name, ["4", "6"])
        assert after(arguments, "--teacher") == str(teacher)
    assert after(trained["recommended kernel sizes"], "--kernel-sizes") == '{"a": 3}'
    measured = [part for part in commands[-1][1] if "=" in part]
    assert f"linear attention={folder / 'linear attention' / 'linear.safetensors'}" in measured
    assert f"ΔConv={folder / 'ΔConv' / 'deltaconv.safetensors'}" in measured and len(measured) == len(
        STUDENTS
    )


def test_another_teacher_has_a_folder_of_its_own_and_looking_is_done_once(tmp_path, commands):
    teacher = tmp_path / "teacher.safetensors"
    teacher.write_bytes(b"one")
    first = compare(teacher, tmp_path, 4, 6)
    assert compare(teacher, tmp_path, 4, 6) == first
    teacher.write_bytes(b"two")
    assert compare(teacher, tmp_path, 4, 6) != first
    assert [module for module, _ in commands].count("look") == 2


def test_a_failure_says_what_failed(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=3))
    with pytest.raises(SystemExit, match="look ended with 3"):
        compare_students.run("look")
