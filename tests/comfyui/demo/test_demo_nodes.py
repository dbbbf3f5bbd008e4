"""The demo nodes in the real ComfyUI: what they hand over is what the patch node and the sampler need."""

from importlib import import_module

import pytest
import torch

from deltaconv_core.weights.manifest import load_manifest


@pytest.fixture(scope="module")
def nodes(pack):
    model, prompt = (import_module(f".nodes.demo_{name}", pack.__name__) for name in ("model", "prompt"))
    return {
        "model": model.DemoModel,
        "joint": model.JointDemoModel,
        "latent": model.DemoLatent,
        "prompt": prompt.DemoPrompt,
    }


@pytest.fixture(scope="module")
def model(nodes):
    with torch.inference_mode():  # as ComfyUI runs every node
        return nodes["model"].execute().result[0]


def test_the_manifest_recommends_weights_for_the_demo_model(pack, model):
    sites = import_module(".nodes.host.model.sites", pack.__name__).find_sites(model)
    record = load_manifest().recommended(sites.architecture)
    assert record is not None
    assert record.name == "demo"


@pytest.mark.parametrize("kind", ["model", "joint"])
@pytest.mark.parametrize(("height", "width"), [(48, 48), (33, 47), (64, 40)])
def test_samples_any_size(nodes, kind, height, width):
    import comfy.sample

    model = nodes[kind].execute().result[0]
    latent = nodes["latent"].execute(width, height, 2).result[0]["samples"]
    assert latent.shape == (2, 3, height, width)
    positive, negative = (
        nodes["prompt"].execute(text).result[0] for text in ("three red crosses, black", "")
    )
    noise = torch.randn(latent.shape, generator=torch.manual_seed(0))
    picture = comfy.sample.sample(
        model, noise, 2, 2.0, "euler", "normal", positive, negative, latent, disable_pbar=True
    )
    assert picture.shape == latent.shape
    assert picture.isfinite().all()


def test_model_is_rebuilt_the_same(model):
    """Newer hosts rebuild a MODEL from `cached_patcher_init`, when they train or move it."""
    build, arguments = model.cached_patcher_init
    again = build(*arguments, disable_dynamic=True).model.state_dict()
    for name, weight in model.model.state_dict().items():
        assert torch.equal(weight, again[name]), name


def test_weights_can_be_trained_through(model):
    assert not any(p.is_inference() for p in model.model.parameters())


def test_both_models_have_the_same_words(pack):
    files, unet = (
        import_module(f".{name}", pack.__name__) for name in ("demo.files", "nodes.host.demo.unet")
    )
    first, other = (unet.load_words(str(file())) for file in (files.teacher_file, files.joint_file))
    assert torch.equal(first, other)


def test_words_reach_the_conditioning(nodes):
    first, second, empty = (
        nodes["prompt"].execute(text).result[0][0][0] for text in ("red circle", "Circle, RED", "")
    )
    assert first.shape == (1, 6, 64)
    assert torch.equal(first, second)
    assert (first != empty).any(dim=2).sum() == 2


@pytest.mark.parametrize(
    ("text", "named"), [("a red cat", "'cat'"), ("left right", "both name the position")]
)
def test_a_prompt_that_cannot_be_understood_is_refused_before_it_runs(nodes, text, named):
    assert nodes["prompt"].validate_inputs(text="red circle") is True
    assert named in nodes["prompt"].validate_inputs(text=text)
