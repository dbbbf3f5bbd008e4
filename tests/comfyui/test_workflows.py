"""Every workflow runs in a real server, on small models in files of the names that the workflows ask for.

Nothing of a workflow is changed but the number of steps and the size. What the pictures would look like, and
that the real files are told from each other by their real widths, is not shown here.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from deltaconv_core.weights.manifest import builtin_path
from scripts import workflow
from scripts.comfy_server import ComfyServer
from testing.comfy_servers import server_with

MODELS = {
    "checkpoints/DreamShaper_8_pruned.safetensors": "sd15",
    "checkpoints/sd_xl_base_1.0.safetensors": "sdxl",
    "diffusion_models/PixArt-Sigma-XL-2-1024-MS.safetensors": "pixart_sigma",
    "text_encoders/t5xxl_fp8_e4m3fn.safetensors": "t5",
    "vae/sdxl_vae.safetensors": "vae",
    "checkpoints/flux1-dev-fp8.safetensors": "flux",
    "diffusion_models/z_image_turbo_bf16.safetensors": "z_image",
    "text_encoders/qwen_3_4b.safetensors": "t5",
    "vae/ae.safetensors": "ae",
}
BLOCKS = {
    "ConvFusion-sd15-mjv5": "sd15",
    "ConvFusion-sd15-laion": "sd15",
    "ConvFusion-sdxl-mjv5": "sdxl",
    "ConvFusion-pixart1024-mjv5": "pixart_sigma",
}
# Sites of the small model; what the size is divided by (ComfyUI's PixArt needs latents of more than 32);
# the side of the saved picture, None for a sheet of two.
EXPECTED = {
    "sd15_text_to_image": (16, 4, 128),
    "sdxl_text_to_image": (70, 8, 128),
    "pixart_sigma_text_to_image": (4, 2, 512),
    "sd15_hires_fix_2048": (16, 8, 256),
    "sd15_attention_first": (16, 4, None),
    "sd15_two_weights": (16, 4, None),
}
# Workflows that distil; sites, and the side of the pictures that they learn from.
DISTILLING = [("2_distill_demo", 9, 48), ("sd15_distill", 16, 128)]
# What the demo model's own workflows end in, a part of the text under that node.
AT_ONCE = {
    "1_start_here": ("DeltaConvCompare", "Mean of 4 pairs: PSNR"),
    "3_attention_locality": ("DeltaConvLocality", "Looked at 9 self-attentions"),
    "4_neighborhood_and_deltaconv": ("DeltaConvCompare", "Mean of 2 pairs: PSNR"),
    "5_benchmark": ("DeltaConvBenchmark", "One pass of the network"),
}
# Workflows that convert a model of text and image together; its attentions of the image.
CONVERTING = {"z_image_turbo_2048": 3, "flux1_dev_2048": 4}
STEPS = 2


@pytest.fixture(scope="module")
def server(comfy_host, tmp_path_factory) -> Iterator[ComfyServer]:
    """A server that knows the small models and has them in its folders."""
    with server_with("stand_in_nodes", tmp_path_factory.mktemp("config")) as running:
        write_models(running.base / "models")
        yield running


def write_models(folder: Path) -> None:
    """The models, ΔConv weights for them, and a list that recommends those for the small models."""
    from testing import comfy_model_files

    comfy_model_files.write({folder / path: name for path, name in MODELS.items()})
    published = {record["name"]: record for record in json.loads(builtin_path().read_text(encoding="utf-8"))}
    own = []
    for name, model in BLOCKS.items():
        shape = comfy_model_files.write_blocks(folder / "deltaconv" / f"{name}.safetensors", model)
        if published[name]["recommended_for"]:
            own.append(published[name] | {"recommended_for": [shape]})
    (folder / "deltaconv" / "manifest.json").write_text(json.dumps(own))


def prompt_of(server: ComfyServer, name: str) -> dict[str, Any]:
    """The workflow's prompt, shortened."""
    saved = workflow.load(workflow.FOLDER / f"{name}.json")
    prompt = workflow.to_prompt(saved, server.object_info())
    for inputs in inputs_of(prompt, "KSampler"):
        inputs["steps"] = STEPS
    for inputs in inputs_of(prompt, "EmptyLatentImage"):  # the demo model's own workflows have none
        part = EXPECTED[name][1]
        inputs |= {"width": inputs["width"] // part, "height": inputs["height"] // part}
    return prompt


def inputs_of(prompt: dict[str, Any], class_type: str) -> list[dict[str, Any]]:
    return [node["inputs"] for node in prompt.values() if node["class_type"] == class_type]


def picture(server: ComfyServer, prompt: dict[str, Any], outputs: dict[str, Any]) -> Any:
    """The picture of the only SaveImage node."""
    (key,) = (key for key, node in prompt.items() if node["class_type"] == "SaveImage")
    png = server.view(outputs[key]["images"][0])
    return numpy.array(Image.open(io.BytesIO(png)).convert("RGB"))


def texts_of(prompt: dict[str, Any], outputs: dict[str, Any], class_type: str) -> list[str]:
    """What stands under the nodes of this type."""
    return [outputs[key]["text"][0] for key, node in prompt.items() if node["class_type"] == class_type]


def test_all_are_here():
    files = {file.stem for file in workflow.FOLDER.glob("*.json")}
    elsewhere = "6_convert_demo"  # tests/comfyui/distill
    assert files == {*EXPECTED, *(name for name, *_ in DISTILLING), *CONVERTING, *AT_ONCE, elsewhere}


@pytest.mark.parametrize("name", AT_ONCE)
def test_runs_with_the_model_that_comes_along(server, name):
    prompt = prompt_of(server, name)
    outputs = server.run(prompt)
    kind, expected = AT_ONCE[name]
    texts = texts_of(prompt, outputs, kind)
    assert texts and all(expected in text for text in texts)


@pytest.mark.parametrize("name", EXPECTED)
def test_runs(server, name):
    sites, _, side = EXPECTED[name]
    server.post("/free", {"free_memory": True})  # what is taken from memory does not tell again
    prompt = prompt_of(server, name)
    outputs = server.run(prompt)
    told = texts_of(prompt, outputs, "DeltaConvPatchModel")
    assert told
    assert all(f"stands in for {sites} of {sites} self-attentions" in text for text in told)
    seen = picture(server, prompt, outputs)
    assert side is None or seen.shape == (side, side, 3)
    assert seen.std() > 1


@pytest.mark.parametrize(
    ("name", "setting"), [("sd15_attention_first", "start_percent"), ("sd15_two_weights", "weights")]
)
def test_compares_one_thing(server, name, setting):
    """The two pictures differ, and are the same once that one setting is the same."""
    prompt = prompt_of(server, name)
    (told,) = texts_of(prompt, server.run(prompt), "DeltaConvCompare")
    assert " dB, SSIM " in told
    one, other = inputs_of(prompt, "DeltaConvPatchModel")
    assert one[setting] != other[setting]
    other[setting] = one[setting]
    (told,) = texts_of(prompt, server.run(prompt), "DeltaConvCompare")
    assert told == "1: PSNR infinite (equal), SSIM 1.000"


@pytest.mark.parametrize("name", CONVERTING)
def test_converts(server, name):
    """At 256 x 256, where attention may well stay; whichever runs, there is a picture."""
    prompt = prompt_of(server, name)
    (latent,) = inputs_of(prompt, "EmptySD3LatentImage")
    assert (latent["width"], latent["height"]) == (2048, 2048)
    latent |= {"width": 256, "height": 256}
    for inputs in inputs_of(prompt, "DeltaConvConvertModel"):
        inputs |= {"pictures": 4, "steps": STEPS}
    outputs = server.run(prompt)
    (told,) = texts_of(prompt, outputs, "DeltaConvConvertModel")
    assert f" of {CONVERTING[name]} self-attentions are replaced" in told
    assert "A picture of 256 x 256, 2 steps" in told
    seen = picture(server, prompt, outputs)
    assert seen.shape == (256, 256, 3) and seen.std() > 1


@pytest.mark.parametrize(("name", "sites", "side"), DISTILLING)
def test_distills(server, name, sites, side):
    """One step of each phase, and all that comes after; pictures from a folder where it asks for one."""
    saved = workflow.load(workflow.FOLDER / f"{name}.json")
    for folder in workflow.input_folders(saved):
        (server.base / "input" / folder).mkdir()
        for number in range(2):
            path = server.base / "input" / folder / f"{number}.png"
            Image.new("RGB", (side + 9, side + 20 * number), (90 * number, 200, 30)).save(path)
            path.with_suffix(".txt").write_text(f"picture {number}")
    prompt = workflow.to_prompt(saved, server.object_info())
    shorter = {"steps": STEPS, "layer_steps": 1, "output_steps": 1}
    shorter |= dict.fromkeys(("width", "height"), side)
    for node in prompt.values():
        node["inputs"] |= {key: value for key, value in shorter.items() if key in node["inputs"]}
    outputs = server.run(prompt)
    (distilled,) = texts_of(prompt, outputs, "DeltaConvDistill")
    assert distilled.startswith(f"2 of 2 steps of {'demo' if side == 48 else 'sd15'}_00001.")
    assert f"{sites} blocks" in distilled.splitlines()[-1]
    (kept,) = texts_of(prompt, outputs, "DeltaConvSaveWeights")
    assert kept.startswith(f"Saved {sites} blocks")
    assert all("PSNR" in text for text in texts_of(prompt, outputs, "DeltaConvCompare"))
