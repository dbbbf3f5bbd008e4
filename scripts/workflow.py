"""From a workflow as the UI saves it to a prompt as the API wants it, and checks of both.

Only what a ComfyUI server says about its nodes (`/object_info`) is used. Handles plain workflows: every node
active, no subgraphs, no reroutes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .comfy_host import REPOSITORY

Json = dict[str, Any]

FOLDER = REPOSITORY / "example_workflows"

NOTES = {"Note", "MarkdownNote"}
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


class WorkflowError(ValueError):
    """The workflow does not fit the server's nodes; the message lists every place."""


def load(file: Path) -> Json:
    """Read a workflow file."""
    return dict(json.loads(file.read_text(encoding="utf-8")))


def title(node: Json) -> str:
    """What stands at the head of the node."""
    return str(node.get("title") or node["type"])


def model_files(workflow: Json) -> list[dict[str, str]]:
    """The model files that the workflow asks for: "name", "directory" under models/, "url" to get it from.

    These are the entries by which the UI offers to download what is missing.
    """
    return [file for node in workflow["nodes"] for file in node.get("properties", {}).get("models", [])]


def to_prompt(workflow: Json, object_info: Json) -> Json:
    """The API-format prompt of a UI-format workflow.

    Raises:
        WorkflowError: nodes, inputs, links or widget values that the server's nodes do not have.
    """
    problems: list[str] = []
    sources = {link[0]: (str(link[1]), link[2]) for link in workflow["links"]}
    prompt: Json = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        name = f"{title(node)} (node {node['id']})"
        info = object_info.get(node["type"])
        if info is None:
            problems.append(f"{name}: no node of type {node['type']} on this server")
        elif node.get("mode", 0) != 0:
            problems.append(f"{name}: muted or bypassed")
        else:
            values, found = widget_values(node, info)
            linked, more = linked_inputs(node, info, sources)
            problems += [f"{name}: {problem}" for problem in found + more]
            prompt[str(node["id"])] = {
                "class_type": node["type"],
                "inputs": {**values, **linked},
                "_meta": {"title": title(node)},
            }
    if problems:
        raise WorkflowError("\n".join(problems))
    return prompt


def inputs_of(info: Json) -> Json:
    """A node's declared inputs, in the order of the UI: name -> (type or list of choices, options)."""
    groups = info["input"]
    declared = {**groups.get("required", {}), **groups.get("optional", {})}
    return {name: (spec[0], spec[1] if len(spec) > 1 else {}) for name, spec in declared.items()}


def input_folders(workflow: Json) -> list[str]:
    """Folders in ComfyUI's input folder that the workflow loads pictures from."""
    return [
        node["widgets_values"][0]
        for node in workflow["nodes"]
        if node["type"].startswith("LoadImage") and node["type"].endswith("DataSetFromFolder")
    ]


def is_widget(kind: Any, options: Json) -> bool:
    return (isinstance(kind, list) or kind in WIDGET_TYPES) and not options.get("forceInput", False)


def widget_values(node: Json, info: Json) -> tuple[Json, list[str]]:
    """Values of the node's widgets by name, and what is wrong with them."""
    values: Json = {}
    problems: list[str] = []
    saved = list(node.get("widgets_values") or [])
    for name, (kind, options) in inputs_of(info).items():
        if not is_widget(kind, options):
            continue
        if not saved:
            problems.append(f"no value saved for {name}")
            continue
        values[name] = saved.pop(0)
        choices = kind if isinstance(kind, list) else options.get("options")
        if choices is not None and values[name] not in choices:
            problems.append(f"{name} is {values[name]!r}, the server offers {choices}")
        if options.get("control_after_generate") and saved:
            saved.pop(0)  # "fixed", "randomize", ...: the UI's own
    # what comes through a link may have had a widget in the ComfyUI that the workflow was saved with
    linked = [slot for slot in node.get("inputs", []) if "widget" in slot and slot.get("link") is not None]
    if len(saved) > len(linked):
        problems.append(f"values that belong to no input: {saved}")
    return values, problems


def linked_inputs(node: Json, info: Json, sources: dict[int, tuple[str, int]]) -> tuple[Json, list[str]]:
    """The node's connected inputs as [node id, output index], and what is wrong with the node's sockets."""
    declared = inputs_of(info)
    linked: Json = {}
    problems = [
        f"no input {entry['name']!r}" for entry in node.get("inputs", []) if entry["name"] not in declared
    ]
    for entry in node.get("inputs", []):
        if entry.get("link") is not None:
            if entry["link"] not in sources:
                problems.append(f"{entry['name']}: link {entry['link']} does not exist")
            else:
                linked[entry["name"]] = list(sources[entry["link"]])
    unconnected = [name for name in info["input"].get("required", {}) if not is_widget(*declared[name])]
    problems += [f"{name} is not connected" for name in unconnected if name not in linked]
    outputs = [entry["type"] for entry in node.get("outputs", [])]
    # Newer versions of ComfyUI add outputs at the end (SaveImage: its images).
    if outputs != info["output"][: len(outputs)]:
        problems.append(f"outputs are {outputs} in the file and {info['output']} on the server")
    return linked, problems
