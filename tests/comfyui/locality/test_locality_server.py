"""The templates of locality and windows in a real server, on the demo model; stopped on the way, too."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from deltaconv_core.locality import Recommendation
from scripts import workflow


@pytest.fixture
def prompt(comfy_server):
    return of_template(comfy_server, "3_attention_locality")


@pytest.fixture
def drawing(comfy_server):
    """Samples with attention, with a window of it and with ΔConv, and compares them."""
    return of_template(comfy_server, "4_neighborhood_and_deltaconv")


def of_template(server, name):
    saved = workflow.load(workflow.FOLDER / f"{name}.json")
    prompt = workflow.to_prompt(saved, server.object_info())
    for inputs in (node["inputs"] for node in prompt.values() if "steps" in node["inputs"]):
        inputs["steps"] = 4
    return prompt


def of_type(prompt, class_type):
    return [key for key, node in prompt.items() if node["class_type"] == class_type]


def picture(server, outputs, key):
    return np.array(Image.open(io.BytesIO(server.view(outputs[key]["images"][0]))).convert("RGB"))


def test_the_workflow(comfy_server, prompt):
    (key,) = of_type(prompt, "DeltaConvLocality")
    seen = []
    outputs = comfy_server.run(prompt, lambda kind, data: seen.append((kind, data)))
    assert outputs[key]["text"][0].startswith("Looked at 9 self-attentions of unet-64x2-128x7")
    figure = picture(comfy_server, outputs, key)
    assert figure.shape[1] == 1024 and figure.std() > 20
    texts = [outputs[one]["text"][0] for one in of_type(prompt, "PreviewAny")]
    assert "48 × 48 latent, steps 1, 2, 3, 4 of 4" in texts[0] and "down0.0" in texts[0]
    advice = Recommendation.from_json(texts[1])
    assert advice.architecture == "unet-64x2-128x7"
    assert len(advice.kernel_sizes) + len(advice.skip) == 9
    progress = [data["value"] for kind, data in seen if kind == "progress" and data["node"] == key]
    assert progress[-1] == 4 + 4 * 9


def test_the_workflow_with_a_window(comfy_server, drawing):
    window, deltaconv = of_type(drawing, "DeltaConvCompare")
    outputs = comfy_server.run(drawing)
    first, second = (picture(comfy_server, outputs, key) for key in (window, deltaconv))
    assert first.shape == second.shape and (first != second).mean() > 0.1


def test_stopped_on_the_way(comfy_server, prompt, drawing):
    (key,) = of_type(prompt, "DeltaConvLocality")
    sheet = of_type(drawing, "DeltaConvCompare")[0]
    expected = picture(comfy_server, comfy_server.run(drawing), sheet)
    only = {one: prompt[one] for one in (key, *inputs_of(prompt, key))}
    only[key] = json.loads(json.dumps(only[key]))
    only[key]["inputs"] |= {"steps": 1000, "looks": 1000}

    def stop(kind, data):
        if kind == "progress" and data["node"] == key and data["value"] >= 3:
            comfy_server.interrupt()

    assert comfy_server.failure(comfy_server.queue(only, stop)) == "interrupted"
    (seed,) = of_type(drawing, "PrimitiveInt")
    comfy_server.run(drawing | {seed: {"class_type": "PrimitiveInt", "inputs": {"value": 2}}})
    again = picture(comfy_server, comfy_server.run(drawing), sheet)
    assert (again == expected).all()


def inputs_of(prompt, key):
    """The nodes that one is connected to."""
    return [value[0] for value in prompt[key]["inputs"].values() if isinstance(value, list)]
