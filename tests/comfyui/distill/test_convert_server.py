"""The conversion's workflow in a real server, on the demo model; stopped on the way, too."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from scripts import workflow


@pytest.fixture
def prompt(comfy_server):
    saved = workflow.load(workflow.FOLDER / "6_convert_demo.json")
    prompt = workflow.to_prompt(saved, comfy_server.object_info())
    for inputs in (node["inputs"] for node in prompt.values()):
        inputs |= {name: 2 for name in ("steps",) if name in inputs}
        inputs |= {name: 4 for name in ("pictures",) if name in inputs}
    return prompt


def of_type(prompt, class_type):
    return [key for key, node in prompt.items() if node["class_type"] == class_type]


def test_the_workflow(comfy_server, prompt):
    (key,) = of_type(prompt, "DeltaConvConvertModel")
    seen = []
    outputs = comfy_server.run(prompt, lambda kind, data: seen.append((kind, data)))
    report = outputs[key]["text"][0]
    assert "of 9 self-attentions are replaced" in report and "A picture of 96 x 96, 2 steps" in report
    progress = [data["value"] for kind, data in seen if kind == "progress" and data["node"] == key]
    assert progress[-1] == 4 * 2
    for one in of_type(prompt, "DeltaConvCompare"):
        saved = Image.open(io.BytesIO(comfy_server.view(outputs[one]["images"][0]))).convert("RGB")
        assert np.array(saved).std() > 1  # both models, side by side


def test_stopped_on_the_way(comfy_server, prompt):
    (key,) = of_type(prompt, "DeltaConvConvertModel")
    prompt[key]["inputs"] |= {"pictures": 1000, "calibration_seed": 5}

    def stop(kind, data):
        if kind == "progress" and data["node"] == key and data["value"] >= 3:
            comfy_server.interrupt()

    assert comfy_server.failure(comfy_server.queue(prompt, stop)) == "interrupted"
    prompt[key]["inputs"] |= {"pictures": 4}
    comfy_server.run(prompt)
