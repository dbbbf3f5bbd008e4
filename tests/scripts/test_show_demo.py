"""`make demo`, as a user runs it and as a user stops it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from PIL import Image

import show_demo
from comfy_host import REPOSITORY


def start(output: Path) -> subprocess.Popen[str]:
    """The demo in a process group of its own, as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / "scripts" / "show_demo.py"), "--output", str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_makes_the_pictures_and_the_sheet(tmp_path):
    program = start(tmp_path)
    text, _ = program.communicate(timeout=500)
    assert program.returncode == 0, text
    assert f"Look at {tmp_path / 'side_by_side.png'}" in text
    names = {f"{way}_{number}.png" for way in ("self-attention", "deltaconv") for number in (1, 2, 3, 4)}
    assert {file.name for file in tmp_path.iterdir()} == {*names, "side_by_side.png"}
    sheet = Image.open(tmp_path / "side_by_side.png")
    single = Image.open(tmp_path / "deltaconv_1.png")
    assert sheet.width > 4 * single.width
    assert sheet.height > 2 * single.height
    assert all(len(Image.open(tmp_path / name).convert("RGB").getcolors(1 << 16)) > 1 for name in names)


@pytest.mark.parametrize(
    ("moment", "how"), [("Starting ComfyUI", signal.SIGTERM), ("Now the pictures", signal.SIGINT)]
)
def test_nothing_is_left_running(tmp_path, moment, how):
    program = start(tmp_path / "output")
    assert program.stdout is not None
    for line in program.stdout:
        if moment in line:
            break
    family = psutil.Process(program.pid).children(recursive=True)
    os.killpg(program.pid, how)
    rest, _ = program.communicate(timeout=60)
    assert program.returncode != 0
    assert "Traceback" not in rest
    assert not psutil.wait_procs(family, timeout=20)[1]
    assert not (tmp_path / "output").exists()


def test_sheet_has_a_row_for_each_label():
    def picture(color):
        return Image.new("RGB", (10, 8), color)

    page = show_demo.sheet(
        ["one", "two"], [[picture("red"), picture("lime")], [picture("blue")]], gap=2, margin=60
    )
    assert page.size == (60 + 2 * 12, 2 + 2 * 10)
    assert page.getpixel((61, 3)) == (255, 0, 0)
    assert page.getpixel((73, 3)) == (0, 255, 0)
    assert page.getpixel((61, 13)) == (0, 0, 255)


def test_the_clock_of_one_sampler_stops_when_the_next_node_starts(monkeypatch):
    now = iter([1.0, 4.0, 4.0, 9.0, 9.0])
    monkeypatch.setattr(show_demo, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    watch = show_demo.Watch({"1": {"_meta": {"title": "KSampler"}}})
    watch("executing", {"node": "1"})
    watch("executing", {"node": "2"})
    watch("executing", {"node": None})
    assert watch.seconds == {"1": 3.0, "2": 5.0}
