"""The workflows fit the nodes of the running server, which lists and serves them; misfits are named."""

from __future__ import annotations

import copy
import json

import pytest

import workflow
from comfy_host import PACK_NAME, REPOSITORY
from comfy_server import ComfyServer

FILES = sorted((REPOSITORY / "workflows").glob("*.json"))


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def file(request):
    return request.param


def test_there_are_workflows():
    assert FILES


def test_fits_the_server(comfy_server: ComfyServer, file):
    saved = workflow.load(file)
    prompt = workflow.to_prompt(saved, comfy_server.object_info())
    active = [node for node in saved["nodes"] if node["type"] not in workflow.NOTES]
    assert set(prompt) == {str(node["id"]) for node in active}


def test_is_listed_and_served_with_a_thumbnail(comfy_server: ComfyServer, file):
    assert file.stem in comfy_server.get("/workflow_templates")[PACK_NAME]
    served = f"/api/workflow_templates/{PACK_NAME}/{file.stem}"
    assert json.loads(comfy_server.request(served + ".json")) == workflow.load(file)
    assert comfy_server.request(served + ".jpg").startswith(b"\xff\xd8\xff")


def test_explains_itself(file):
    notes = [node for node in workflow.load(file)["nodes"] if node["type"] in workflow.NOTES]
    assert any(len(note["widgets_values"][0]) > 100 for note in notes)


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
