"""Prompts through a real ComfyUI server."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from scripts.comfy_server import ComfyServer, ServerError
from testing.comfy_prompts import (
    ARCHITECTURE,
    SITES,
    base_prompt,
    both,
    branch,
    node,
    patch_node,
    pictures,
    write_weights,
)
from testing.comfy_servers import server_with

MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn1"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[ComfyServer]:
    """A server with this repository, with weights for the small model in its folder."""
    with server_with("plain_nodes", tmp_path_factory.mktemp("config")) as running:
        write_weights(running.base / "models" / "deltaconv" / "small.safetensors")
        yield running


@pytest.fixture(scope="module")
def attention_elsewhere(tmp_path_factory) -> bytes:
    """The picture of a server that never saw this repository."""
    with server_with("plain_nodes", tmp_path_factory.mktemp("config"), pack=None) as other:
        assert not any(id.startswith("DeltaConv") for id in other.object_info())
        return pictures(other, other.run(base_prompt()))["attention"]


@pytest.fixture
def folder(server) -> Path:
    return server.base / "models" / "deltaconv"


def run(server, prompt):
    return pictures(server, server.run(prompt))


def test_clones_of_one_model_alternate(server, attention_elsewhere):
    """Both orders, three times each; other seeds between, so the samplers run while the MODELs are cached."""
    seen = []
    for first in ("attention", "ΔConv"):
        for _ in range(3):
            seen.append(run(server, both(first)))
            run(server, both(first, seed=8))
    assert all(result == seen[0] for result in seen)
    assert seen[0]["attention"] == attention_elsewhere
    assert seen[0]["ΔConv"] != attention_elsewhere


def test_models_made_anew_give_the_same_pictures(server, attention_elsewhere):
    """The same, with every node run again from scratch."""
    before = run(server, both())
    server.post("/free", {"unload_models": True, "free_memory": True})
    after = run(server, both("ΔConv"))
    assert after == before and after["attention"] == attention_elsewhere


def test_a_cached_node_says_again_what_it_said(server):
    """ComfyUI does not run the node, so it is the fingerprint that tells; each setting has its own text."""

    def said(**options):
        ran, texts = [], []

        def listen(kind, data):
            if kind == "executing":
                ran.append(data["node"])
            if kind == "progress_text" and data["node"] == "patched":
                texts.append(data["text"])

        patched = patch_node(end_percent=0.875, **options)  # of no other test
        server.run(base_prompt() | {"patched": patched} | branch("ΔConv", "patched"), listen)
        return ("patched" in ran), texts

    ran, (first,) = said()
    assert ran and "5 of" in first
    assert said() == (False, [first])
    ran, (other,) = said(blocks="mid")
    assert ran and other != first
    assert said(blocks="mid") == (False, [other])
    assert said()[1][-1] == first


def test_a_range_is_neither_of_the_two(server):
    prompt = both(steps=4) | {"part": patch_node(end_percent=0.4)} | branch("some steps", "part", steps=4)
    seen = run(server, prompt)
    assert len(set(seen.values())) == 3


def test_weights_through_the_socket_are_the_same_weights(server):
    loaded = {
        "loaded": node("DeltaConvLoadWeights", weights="small.safetensors"),
        "patched": patch_node(weights="auto", deltaconv=["loaded", 0]),
    }
    outputs = server.run(both() | loaded)
    assert pictures(server, outputs) == run(server, both())
    assert outputs["loaded"]["text"][0].startswith(f"small.safetensors: 5 blocks for {ARCHITECTURE}")
    assert outputs["patched"]["text"][0].startswith(
        f"ΔConv stands in for 5 of 5 self-attentions of {ARCHITECTURE}"
    )


def test_a_changed_file_is_read_again(server, folder):
    path = write_weights(folder / "changing.safetensors")
    prompt = both() | {"patched": patch_node(weights="changing.safetensors")}
    before = run(server, prompt)
    write_weights(path, seed=1)
    after = run(server, prompt)
    assert after["ΔConv"] != before["ΔConv"] and after["attention"] == before["attention"]


def test_what_the_server_tells_about_the_nodes(server):
    info = server.object_info()["DeltaConvPatchModel"]
    assert info["display_name"] == "ΔConv Patch Model" and info["category"] == "ΔConv"
    assert list(info["input"]["required"]) == [
        "model",
        "weights",
        "blocks",
        "start_percent",
        "end_percent",
        "base_weights",
        "base_weights_strength",
    ]
    assert info["output"] == ["MODEL"]
    assert "small.safetensors" in server.get("/models/deltaconv")


def test_every_node_has_a_complete_page_of_documentation(server):
    """In English and Chinese, each with the picture; tables would not fit into the narrow panel."""
    ours = {id: info for id, info in server.object_info().items() if id.startswith("DeltaConv")}
    assert {"DeltaConvPatchModel", "DeltaConvLoadWeights", "DeltaConvDemoModel"} <= set(ours)
    chinese = server.get("/i18n")["zh"]["nodeDefs"]
    folder = "/extensions/ComfyUI-DeltaConv/docs"
    for id, info in ours.items():
        page = server.request(f"{folder}/{id}.md").decode()
        page_in_chinese = server.request(f"{folder}/{id}/zh.md").decode()
        assert page.startswith(f"# {info['display_name']}\n")
        assert page_in_chinese.startswith(f"# {chinese[id]['display_name']}\n")
        for name in [*info["input"].get("required", {}), *info["input"].get("optional", {})]:
            assert re.search(rf"^- \*\*{name}\*\*[: ]", page, re.M), (id, name)
            shown = re.escape(chinese[id]["inputs"][name]["name"])
            assert re.search(rf"^- \*\*{shown}\*\*（{name}[），]", page_in_chinese, re.M), (id, name)
        for text in (page, page_in_chinese):
            (picture,) = re.findall(r"!\[.+\]\((.+)\)", text)
            assert server.request(f"{folder}/{picture}")[8:12] == b"WEBP"
            assert "|--" not in text and "| --" not in text


# ---- bad input: one clear error, nothing changed, the next prompt works ----


def other_architecture(path):
    write_weights(path, architecture="unet-48x1", sites={MIDDLE: 48})


def other_channels(path):
    write_weights(path, sites=SITES | {MIDDLE: 48})


def truncated(path):
    write_weights(path)
    path.write_bytes(path.read_bytes()[:-100])


def with_nan(path):
    write_weights(path)
    with path.open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\x00\x00\xc0\x7f")


def missing_site(path):
    write_weights(path, sites={id: n for id, n in SITES.items() if id != MIDDLE})


def extra_site(path):
    write_weights(path, sites=SITES | {MIDDLE.replace("attentions.0", "attentions.1"): 64})


def extra_key(path):
    write_weights(path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file(load_file(path) | {"blocks.surprise": torch.ones(1)}, path, header)


def pickled(path):
    path.write_bytes(pickle.dumps({"weight": [1.0]}))


def torch_pickle(path):
    torch.save({"weight": torch.ones(1)}, path)


def empty(path):
    path.write_bytes(b"")


BAD_FILES = {
    other_architecture: "for unet-48x1 (1 sites: 1 of 48 channels), but this MODEL is unet-32x2-64x3",
    other_channels: f"channels differ at {MIDDLE} (48, in the MODEL 64)",
    truncated: "safetensors",
    with_nan: "NaN",
    missing_site: f"none for {MIDDLE}",
    extra_site: "the MODEL has no mid_block.attentions.1",
    extra_key: "surprise",
    pickled: "pickle",
    torch_pickle: "pickle",
    empty: "safetensors",
}


@pytest.mark.parametrize(("spoil", "message"), BAD_FILES.items(), ids=[f.__name__ for f in BAD_FILES])
def test_bad_files(server, folder, spoil, message):
    good = run(server, both())
    spoil(folder / f"{spoil.__name__}.safetensors")
    history = server.queue(both(seed=9) | {"patched": patch_node(weights=f"{spoil.__name__}.safetensors")})
    failure = server.failure(history)
    assert failure.startswith("DeltaConvPatchModel (node patched): ") and message in failure
    assert "\n" not in failure
    assert run(server, both()) == good


@pytest.mark.parametrize("weights", ["../small.safetensors", "/etc/hostname", "gone.safetensors"])
@pytest.mark.parametrize("id", ["DeltaConvPatchModel", "DeltaConvLoadWeights"])
def test_a_path_outside_the_model_folder(server, folder, weights, id):
    write_weights(folder.parent / "small.safetensors")
    prompt = both("ΔConv")
    if id == "DeltaConvPatchModel":
        prompt["patched"] = patch_node(weights=weights)
    else:
        prompt["loaded"] = node(id, weights=weights)
        prompt["patched"]["inputs"]["deltaconv"] = ["loaded", 0]
    (error,) = refused(server, prompt)
    assert f"{weights!r} is neither a file in the model folder" in error["details"]
    run(server, both())


def refused(server, prompt):
    """The errors of a prompt that ComfyUI does not even start."""
    with pytest.raises(ServerError) as refusal:
        server.run(prompt)
    return [error for report in refusal.value.details["node_errors"].values() for error in report["errors"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_percent": -0.1}, "start_percent"),
        ({"base_weights_strength": 2.0}, "base_weights_strength"),
    ],
)
def test_values_out_of_bounds_do_not_start(server, changes, message):
    errors = refused(server, both("ΔConv") | {"patched": patch_node(**changes)})
    assert message in errors[0]["details"]


BAD_SETTINGS = {
    "unknown glob": ({"blocks": "up_blocks.9.*"}, "the block selection 'up_blocks.9.*' matches no site"),
    "nothing left": ({"blocks": "mid,-all"}, "the block selection 'mid,-all' selects nothing"),
    "range": ({"start_percent": 0.8, "end_percent": 0.2}, "start_percent=0.8, end_percent=0.2"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_settings(server, changes, message):
    good = run(server, both())
    failure = server.failure(server.queue(both(seed=9) | {"patched": patch_node(**changes)}))
    assert message in failure
    assert run(server, both()) == good


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize(
    "other",
    [
        node("HyperTile", tile_size=256, swap_size=2, max_depth=0, scale_depth=False),
        node("TomePatchModel", ratio=0.5),
    ],
    ids=lambda other: other["class_type"],
)
def test_nodes_that_change_the_tokens(server, other, place):
    good = run(server, both())
    prompt = base_prompt(size=(64, 64), steps=1) | {"other": copy.deepcopy(other), "patched": patch_node()}
    if place == "before":
        prompt["other"]["inputs"]["model"] = ["model", 0]
        prompt["patched"]["inputs"]["model"] = ["other", 0]
    else:
        prompt["other"]["inputs"]["model"] = ["patched", 0]
    prompt |= branch("ΔConv", "patched" if place == "before" else "other", steps=1)
    failure = server.failure(server.queue(prompt))
    assert "expected 64 x 64 = 4096 tokens" in failure and "HyperTile and Token Merging" in failure
    assert run(server, both()) == good


def test_a_model_without_sites(server):
    prompt = both() | {"model": node("PlainModelWithoutAttention")}
    failure = server.failure(server.queue(prompt))
    assert "has no self-attention that ΔConv can stand in for" in failure
