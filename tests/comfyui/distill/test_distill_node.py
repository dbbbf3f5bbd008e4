"""The inputs of ΔConv Distill: workflows keep their widgets' values by position, prompts by name."""

from __future__ import annotations

import json
import re
from typing import Any

from scripts import workflow
from scripts.comfy_host import REPOSITORY
from testing.comfy_models import in_pack

SOCKETS = ("MODEL", "LATENT", "CONDITIONING")

# type, id, optional, and what the widget has beside its tooltip
INPUTS = [
    ("MODEL", "model", False, {}),
    ("LATENT", "latents", False, {}),
    ("CONDITIONING", "positive", False, {}),
    (
        "COMBO", "preset", False,
        {"default": "12 GB", "options": ["custom", "8 GB", "12 GB", "16 GB", "24 GB"]},
    ),
    ("INT", "layer_steps", False, {"default": 500, "min": 0, "max": 1_000_000}),
    ("INT", "output_steps", False, {"default": 500, "min": 0, "max": 1_000_000}),
    ("FLOAT", "learning_rate", False, {"default": 3e-4, "min": 1e-7, "max": 1.0, "step": 1e-7}),
    ("STRING", "run_name", False, {"default": "run"}),
    ("COMBO", "resume", False, {"default": "new run", "options": ["new run"]}),
    ("CONDITIONING", "negative", True, {}),
    ("FLOAT", "caption_dropout", True, {"default": 0.15, "min": 0.0, "max": 1.0, "step": 0.01}),
    ("STRING", "blocks", True, {"default": "all"}),
    ("STRING", "kernel_sizes", True, {"default": "auto"}),
    ("COMBO", "form", True, {"default": "lean", "options": ["lean", "released"]}),
    ("INT", "batch_size", True, {"default": 1, "min": 1, "max": 1024}),
    ("INT", "accumulation", True, {"default": 1, "min": 1, "max": 1024}),
    ("COMBO", "precision", True, {"default": "auto", "options": ["auto", "fp32", "bf16", "fp16"]}),
    ("COMBO", "optimizer", True, {"default": "adamw", "options": ["adamw", "adamw8bit"]}),
    ("FLOAT", "ema", True, {"default": 0.995, "min": 0.0, "max": 0.99999, "step": 0.00001}),
    ("BOOLEAN", "checkpointing", True, {"default": True}),
    ("COMBO", "feature", True, {"default": "output", "options": ["output", "residual"]}),
    ("INT", "training_seed", True, {"default": 0, "min": 0, "max": 0xFFFFFFFF}),
    ("INT", "save_every", True, {"default": 100, "min": 1, "max": 1_000_000}),
    ("INT", "preview_every", True, {"default": 100, "min": 0, "max": 1_000_000}),
]  # fmt: skip
ASKED = ("default", "min", "max", "step", "options")


def described(input: Any) -> tuple[str, str, bool, dict[str, Any]]:
    values = json.loads(json.dumps(input.as_dict()))  # as the browser gets them
    assert values["tooltip"] and not values.get("multiline") and not values.get("forceInput")
    return input.get_io_type(), input.id, input.optional, {k: values[k] for k in ASKED if k in values}


def same_types(values: dict[str, Any], others: dict[str, Any]) -> bool:
    return all(type(values[name]) is type(others[name]) for name in others)


def test_its_inputs_stay_as_they_are(pack, output):
    inputs = [described(one) for one in in_pack(pack, "nodes.distill").Distill.define_schema().inputs]
    assert inputs == INPUTS
    assert all(same_types(mine[3], told[3]) for mine, told in zip(inputs, INPUTS, strict=True))


def test_workflows_of_before_set_the_widgets_they_meant(pack):
    """By the very positions that the two templates were saved with."""
    widgets = [id for kind, id, _, _ in INPUTS if kind not in SOCKETS]
    for file in ("2_distill_demo", "sd15_distill"):
        saved = workflow.load(workflow.FOLDER / f"{file}.json")
        (node,) = (one for one in saved["nodes"] if one["type"] == "DeltaConvDistill")
        values = dict(zip(widgets, node["widgets_values"], strict=True))
        for kind, id, _, widget in INPUTS:
            if kind == "COMBO":
                assert values[id] in widget["options"]
            elif kind in ("INT", "FLOAT"):
                assert widget["min"] <= values[id] <= widget["max"]
            elif kind == "BOOLEAN":
                assert isinstance(values[id], bool)


def test_its_help_names_every_input_and_default(pack):
    widgets = in_pack(pack, "nodes.host.distill.widgets")
    default_text = in_pack(pack, "deltaconv_core.distill.fields").default_text
    defaults = {
        widgets.OTHER_NAMES.get(name, name): default_text(one) for name, one in widgets.SETTINGS.items()
    }
    text = (REPOSITORY / "web" / "docs" / "DeltaConvDistill.md").read_text(encoding="utf-8")
    inputs = text.partition("## Inputs")[2].partition("## Outputs")[0]
    told = re.findall(r"^- \*\*(\w+)\*\*(?: \((.*?)\))?: .", inputs, re.M)
    assert told == [(id, defaults[id] if kind not in SOCKETS else "") for kind, id, _, _ in INPUTS]


def test_every_input_is_a_setting_that_the_node_reads(pack):
    """Prompts through the API may leave widgets out; what they give arrives under the setting's name."""
    widgets = in_pack(pack, "nodes.host.distill.widgets").Widgets
    defaults = {id: values["default"] for kind, id, _, values in INPUTS if kind not in SOCKETS}
    assert widgets.read({}) == widgets.read({id: [value] for id, value in defaults.items()})
    assert widgets.read({"training_seed": [7], "ema": [0.5]}) == widgets(seed=7, ema=0.5)


def test_runs_are_listed_whenever_the_server_asks(pack, output):
    node = in_pack(pack, "nodes.distill").Distill

    def offered():
        return node.GET_NODE_INFO_V1()["input"]["required"]["resume"][1]["options"]

    assert offered() == ["new run"]
    (output / "mine_00001").mkdir(parents=True)
    (output / "mine_00001" / "state.safetensors").touch()
    assert offered() == ["new run", "mine_00001"]
