"""The workflows fit the nodes of the running server, which lists and serves them; misfits are named."""

from __future__ import annotations

import copy
import io
import json

import pytest
from PIL import Image

from scripts import workflow
from scripts.comfy_host import PACK_NAME
from scripts.comfy_server import ComfyServer

FILES = sorted(workflow.FOLDER.glob("*.json"))


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def file(request):
    return request.param


def test_there_are_workflows():
    assert FILES


def test_fits_the_server(server_with_models: ComfyServer, file):
    """The server has no nodes but ComfyUI's and ours."""
    saved = workflow.load(file)
    prompt = workflow.to_prompt(saved, server_with_models.object_info())
    active = [node for node in saved["nodes"] if node["type"] not in workflow.NOTES]
    assert set(prompt) == {str(node["id"]) for node in active}


def test_is_listed_and_served_with_a_thumbnail(comfy_server: ComfyServer, file):
    assert file.stem in comfy_server.get("/workflow_templates")[PACK_NAME]
    served = f"/api/workflow_templates/{PACK_NAME}/{file.stem}"
    assert json.loads(comfy_server.request(served + ".json")) == workflow.load(file)
    thumbnail = comfy_server.request(served + ".jpg")
    assert len(thumbnail) < 100_000
    with Image.open(io.BytesIO(thumbnail)) as picture:
        assert picture.format == "JPEG" and 400 <= picture.width <= 800 and 300 <= picture.height <= 800


def notes(saved):
    return [node["widgets_values"][0] for node in saved["nodes"] if node["type"] in workflow.NOTES]


def test_explains_itself(file):
    assert any(len(note) > 100 for note in notes(workflow.load(file)))


def test_tells_where_its_models_come_from(file):
    """Everything that a loader of ComfyUI's asks for; ΔConv's own weights are fetched by the node."""
    saved = workflow.load(file)
    loaders = [node for node in saved["nodes"] if not node["type"].startswith("DeltaConv")]
    asked = {str(value) for node in loaders for value in node["widgets_values"]}
    files = workflow.model_files(saved)
    assert {model["name"] for model in files} == {name for name in asked if name.endswith(".safetensors")}
    text = "".join(notes(saved))
    for model in files:
        assert model["url"].startswith("https://huggingface.co/")
        assert f"({model['url']})" in text and model["name"] in text
        assert f"**models/{model['directory']}**" in text


def test_notes_have_no_code_spans(file):
    """They are unreadable in Vue nodes: blue on gray-blue."""
    assert not any("`" in note for note in notes(workflow.load(file)))


def test_has_no_node_that_the_server_calls_deprecated(server_with_models: ComfyServer, file):
    info = server_with_models.object_info()
    kinds = {node["type"] for node in workflow.load(file)["nodes"]} - workflow.NOTES
    assert not [kind for kind in kinds if info[kind].get("deprecated")]


def test_has_no_loose_ends(file):
    """Links are listed by both of their nodes, and nothing else is."""
    saved = workflow.load(file)
    ends = {link[0]: (link[1:3], link[3:5]) for link in saved["links"]}
    outputs = [
        (link, [node["id"], slot])
        for node in saved["nodes"]
        for slot, entry in enumerate(node["outputs"])
        for link in entry["links"] or []
    ]
    inputs = [
        (entry["link"], [node["id"], slot])
        for node in saved["nodes"]
        for slot, entry in enumerate(node["inputs"])
        if entry["link"] is not None
    ]
    assert sorted(outputs) == sorted((link, source) for link, (source, _) in ends.items())
    assert sorted(inputs) == sorted((link, target) for link, (_, target) in ends.items())


OBJECT_INFO = {
    "Make": {
        "input": {"required": {"seed": ["INT", {"control_after_generate": True}], "kind": [["a", "b"]]}},
        "output": ["IMAGE"],
    },
    "Show": {
        "input": {
            "required": {"images": ["IMAGE"], "mode": ["COMBO", {"options": ["x"]}]},
            "optional": {"number": ["FLOAT", {}], "late": ["INT", {"forceInput": True}]},
        },
        "output": [],
    },
}
SMALL = {
    "nodes": [
        {
            "id": 1,
            "type": "Make",
            "widgets_values": [7, "fixed", "b"],
            "outputs": [{"name": "IMAGE", "type": "IMAGE"}],
        },
        {
            "id": 2,
            "type": "Show",
            "title": "Look",
            "inputs": [{"name": "images", "link": 5}, {"name": "number", "link": None, "widget": {}}],
            "widgets_values": ["x", 0.5],
        },
        {"id": 3, "type": "Note", "widgets_values": ["Hello"]},
    ],
    "links": [[5, 1, 0, 2, 0, "IMAGE"]],
}


def test_prompt_of_a_small_workflow():
    assert workflow.to_prompt(SMALL, OBJECT_INFO) == {
        "1": {"class_type": "Make", "inputs": {"seed": 7, "kind": "b"}, "_meta": {"title": "Make"}},
        "2": {
            "class_type": "Show",
            "inputs": {"mode": "x", "number": 0.5, "images": ["1", 0]},
            "_meta": {"title": "Look"},
        },
    }


def test_model_files_of_a_small_workflow():
    wanted = {"name": "a.safetensors", "directory": "vae", "url": "https://example.com/a.safetensors"}
    saved = copy.deepcopy(SMALL)
    saved["nodes"][1]["properties"] = {"models": [wanted]}
    assert workflow.model_files(SMALL) == [] and workflow.model_files(saved) == [wanted]


@pytest.mark.parametrize(
    ("node", "change", "message"),
    [
        (0, {"type": "Gone"}, r"Gone \(node 1\): no node of type Gone"),
        (0, {"mode": 4}, r"Make \(node 1\): muted or bypassed"),
        (0, {"widgets_values": [7, "fixed", "c"]}, r"kind is 'c', the server offers \['a', 'b'\]"),
        (0, {"widgets_values": [7, "fixed"]}, "no value saved for kind"),
        (0, {"widgets_values": [7, "fixed", "b", 1]}, r"values that belong to no input: \[1\]"),
        (0, {"outputs": [{"type": "MASK"}]}, r"outputs are \['MASK'\] in the file"),
        (1, {"inputs": []}, r"Look \(node 2\): images is not connected"),
        (1, {"inputs": [{"name": "images", "link": 9}]}, "link 9 does not exist"),
        (1, {"inputs": [{"name": "images", "link": 5}, {"name": "old", "link": None}]}, "no input 'old'"),
    ],
)
def test_misfits_are_named(node, change, message):
    broken = copy.deepcopy(SMALL)
    broken["nodes"][node].update(change)
    with pytest.raises(workflow.WorkflowError, match=message):
        workflow.to_prompt(broken, OBJECT_INFO)
