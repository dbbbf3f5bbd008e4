"""`make demo`, as a user runs it and as a user stops it."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from PIL import Image, ImageColor

from demo.study.drawings import draw, is_held_out, random_scene
from demo.words import parse_prompt
from scripts import show_demo
from scripts.comfy_host import REPOSITORY


def start(output: Path) -> subprocess.Popen[str]:
    """The demo in a process group of its own, as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "scripts.show_demo", "--output", str(output)],
        cwd=REPOSITORY,
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
    ways, numbers = ("self-attention", "deltaconv"), range(1, len(show_demo.PROMPTS) + 1)
    names = {f"{way}_{number}.png" for way in ways for number in numbers}
    assert {file.name for file in tmp_path.iterdir()} == {*names, "side_by_side.png"}
    lines = text.splitlines()
    for prompt in show_demo.PROMPTS:
        attention, deltaconv = lines[lines.index(prompt) + 1 :][:2]
        assert re.search(r"self-attention +[\d.]+ s +\d of 6 words: .+", attention)
        assert re.search(r"ΔConv +[\d.]+ s +\d of 6 words: .+", deltaconv)
    sheet, single = (Image.open(tmp_path / name) for name in ("side_by_side.png", "deltaconv_1.png"))
    assert sheet.width > 6 * single.width and sheet.height > 2 * single.height
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


def test_prompts_are_six_that_training_never_saw():
    prompts = [parse_prompt(text) for text in show_demo.PROMPTS]
    assert len(set(prompts)) == 6 and all(map(is_held_out, prompts))


def test_other_words_reach_both_samplers():
    prompt = {
        "1": {"class_type": "Words", "inputs": {"text": "old"}},
        "2": {"class_type": "Latent", "inputs": {"width": 48, "height": 32, "batch_size": 4}},
        "3": {
            "class_type": "KSampler",
            "inputs": {"positive": ["1", 0], "latent_image": ["2", 0], "steps": 20},
        },
        "4": {
            "class_type": "DeltaConvCompare",
            "inputs": {"first": ["3", 0], "second": ["3", 0], "first_label": "one", "second_label": "ΔConv"},
        },
    }
    rows = show_demo.find_rows(prompt)
    changed = show_demo.with_text(prompt, rows, "new", steps=2)
    assert changed["1"]["inputs"]["text"] == "new" and changed["2"]["inputs"]["batch_size"] == 1
    assert changed["3"]["inputs"]["steps"] == 2 and prompt["3"]["inputs"]["steps"] == 20
    assert [(row.name, row.sampler) for row in rows] == [("one", "3"), ("ΔConv", "3")]
    assert [prompt[row.save]["inputs"]["images"] for row in rows] == [["3", 0], ["3", 0]]


def test_words_are_read_off_the_saved_picture():
    text = "two purple crosses on the left, white background, pairs"
    drawn = draw(random_scene(parse_prompt(text), np.random.default_rng(0)), 48)
    saved = io.BytesIO()
    Image.fromarray(drawn).save(saved, "png")
    picture = show_demo.decode(saved.getvalue())
    np.testing.assert_array_equal(np.asarray(picture), drawn)
    assert show_demo.read(picture, text) == [
        (word, True) for word in ("cross", "purple", "two", "left", "white", "pairs")
    ]
    assert [right for _, right in show_demo.read(picture, text.replace("two", "three"))].count(False) == 1
    assert ("?", False) in show_demo.read(Image.new("RGB", (48, 48), "gray"), text)


def test_sheet_shows_each_pair_side_by_side():
    def drawn(color):
        return show_demo.Drawn(Image.new("RGB", (10, 10), color), 1.0, [("circle", True), ("HH", False)])

    colors = [("red", "lime"), ("blue", "white"), ("black", "red"), ("blue", "lime")]
    pairs = {f"prompt {number}": [drawn(one), drawn(other)] for number, (one, other) in enumerate(colors)}
    page = show_demo.sheet(["Self-attention", "ΔConv"], pairs)
    side, left, top = 50, show_demo.MARGIN, show_demo.MARGIN + show_demo.ABOVE
    across, down = 2 * side + show_demo.GAP + left, top + side + show_demo.BELOW
    for index, pair in enumerate(colors):
        x, y = left + index % 3 * across, top + index // 3 * down
        for number, color in enumerate(pair):
            assert page.getpixel((x + number * (side + show_demo.GAP) + 1, y + 1)) == ImageColor.getrgb(color)
    shown = np.array([color for _, color in page.getcolors(1 << 16)])
    assert np.abs(shown - ImageColor.getrgb(show_demo.WRONG)).max(axis=1).min() < 30


def test_the_clock_of_one_sampler_stops_when_the_next_node_starts(monkeypatch):
    now = iter([1.0, 4.0, 9.0])
    monkeypatch.setattr(show_demo, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    watch = show_demo.Watch()
    watch("executing", {"node": "1"})
    watch("executing", {"node": "2"})
    watch("executing", {"node": None})
    assert watch.seconds == {"1": 3.0, "2": 5.0}
