"""ΔConv Distill and ΔConv Save Weights through a real ComfyUI server, fed by ComfyUI's own dataset nodes."""

from __future__ import annotations

import csv
from collections.abc import Iterator

import pytest
from PIL import Image

from scripts.comfy_server import ComfyServer, ServerError
from testing.comfy_prompts import base_prompt, branch, node, patch_node, pictures
from testing.comfy_servers import server_with

PICTURES = 4


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[ComfyServer]:
    """A server with a folder of pictures."""
    with server_with("plain_nodes", tmp_path_factory.mktemp("config")) as running:
        folder = running.base / "input" / "pictures"
        folder.mkdir()
        for number in range(PICTURES):
            size = (24, 16) if number else (16, 16)
            Image.new("RGB", size, (60 * number, 200, 30)).save(folder / f"{number}.png")
        if "LoadImageDataSetFromFolder" not in running.object_info():
            pytest.skip("this ComfyUI has no dataset nodes")
        yield running


def training(run_name: str, **changes) -> dict:
    """Pictures of a folder, distillation, and what ComfyUI and we do with the results."""
    inputs = {
        "preset": "custom",
        "layer_steps": 2,
        "output_steps": 2,
        "learning_rate": 1e-3,
        "run_name": run_name,
        "resume": "new run",
        "batch_size": 2,
        "preview_every": 2,
    }
    distil = node(
        "DeltaConvDistill",
        model=["model", 0],
        latents=["encoded", 0],
        positive=["positive", 0],
        negative=["negative", 0],
        **inputs | changes,
    )
    save = node("DeltaConvSaveWeights", deltaconv=["distil", 1], filename_prefix=run_name, dtype="fp32")
    return {
        **base_prompt(),
        "images": node("LoadImageDataSetFromFolder", folder="pictures"),
        "encoded": node("VAEEncode", pixels=["images", 0], vae=["vae", 0]),
        "distil": distil,
        "save": save | {"inputs": {**save["inputs"], "title": "Mine", "license": "MIT"}},
        "graph": node("LossGraphNode", loss=["distil", 2], filename_prefix="loss"),
        **branch("student", "distil"),
    }


def test_learn_save_load_sample(server):
    before = pictures(server, server.run(base_prompt()))["attention"]
    outputs = server.run(training("mine"))
    seen = pictures(server, outputs)
    assert seen["attention"] == before
    text = outputs["distil"]["text"][0]
    assert text.startswith("4 of 4 steps of mine_00001.\n")
    assert f"5 blocks (0.0287 M parameters) learn from {PICTURES}" in text.splitlines()[-1]
    assert "1 of 16x16" in text and "3 of 24x16" in text
    assert len(outputs["graph"]["images"]) == 1
    assert outputs["save"]["text"][0].startswith("Saved 5 blocks for unet-32x2-64x3")
    assert "mine_00001.safetensors" in server.get("/models/deltaconv")
    loaded = base_prompt() | {"patched": patch_node(weights="mine_00001.safetensors")}
    loaded |= branch("student", "patched")
    again = pictures(server, server.run(loaded))
    assert again["student"] == seen["student"] and again["attention"] == before


def test_stop_in_the_middle_and_go_on(server):
    before = pictures(server, server.run(base_prompt()))["attention"]
    said = []

    def stop(kind, data):
        if kind == "progress" and data.get("node") == "distil" and data["value"] >= 3:
            server.interrupt()
        said.append(kind)

    history = server.queue(training("stopped", output_steps=5000), stop)
    assert server.failure(history) == "interrupted"
    assert "To resume it, choose 'stopped_00001' in `resume`" in server.log
    assert pictures(server, server.run(base_prompt(seed=7)))["attention"] == before
    log = server.base / "output" / "deltaconv_runs" / "stopped_00001" / "log.csv"
    done = len(list(csv.DictReader(log.open())))
    assert 3 <= done < 5000
    choices = server.object_info()["DeltaConvDistill"]["input"]["required"]["resume"]
    offered = choices[0] if isinstance(choices[0], list) else choices[1]["options"]
    assert offered[:2] == ["new run", "stopped_00001"]
    outputs = server.run(training("stopped", output_steps=done, resume="stopped_00001"))
    assert outputs["distil"]["text"][0].startswith(f"{done + 2} of {done + 2} steps of stopped_00001.")
    rows = list(csv.DictReader(log.open()))
    assert [int(row["step"]) for row in rows] == list(range(1, done + 3))
    assert pictures(server, outputs)["attention"] == before


def test_the_same_again_is_not_learned_again(server):
    """ComfyUI keeps what the node gave."""
    server.run(training("again"))
    ran = []
    server.run(training("again"), lambda kind, data: kind == "executing" and ran.append(data["node"]))
    assert "distil" not in ran


@pytest.mark.parametrize("resume", ["nothing_00001", "../../models"])
def test_a_run_that_is_not_there_does_not_start(server, resume):
    prompt = training("x", resume=resume)
    del prompt["attention picture"]  # else ComfyUI runs what does not depend on it
    with pytest.raises(ServerError) as refusal:
        server.run(prompt)
    (error,) = refusal.value.details["node_errors"]["distil"]["errors"]
    assert f"there is no run {resume!r} to resume" in error["details"]


def test_one_clear_line_about_other_counts(server):
    prompt = training("x")
    prompt["texts"] = node("PlainConditioning", seed=3)
    prompt["both"] = node("ConditioningCombine", conditioning_1=["positive", 0], conditioning_2=["texts", 0])
    prompt["distil"]["inputs"]["positive"] = ["both", 0]
    failure = server.failure(server.queue(prompt))
    assert failure.startswith("DeltaConvDistill (node distil): latents holds 4 pictures, positive holds 2")
    assert "\n" not in failure
