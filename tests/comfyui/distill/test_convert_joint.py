"""ΔConv Convert Model on MODELs of text and image together, with times that the tests set."""

from __future__ import annotations

import inspect

import pytest
import torch

from testing.comfy_joint_models import joint_conditioning, joint_sites, make_joint, sample_joint
from testing.comfy_models import in_pack, same_state, state
from testing.compare import largest_error

SIZE = (32, 48)


@pytest.fixture(autouse=True)
def times(pack, monkeypatch):
    """Every mixer is faster than attention, those with more landmarks less so; also while sampling."""

    def alternate(runs, device, repeats, check=lambda: None):
        check()
        return {name: [0.01 * (int(name) or 20)] for name in runs}

    monkeypatch.setattr(in_pack(pack, "deltaconv_core.distill.conversion"), "alternate", alternate)
    monkeypatch.setattr(
        in_pack(pack, "deltaconv_core.mixers.joint.plan"),
        "alternate",
        lambda *_: {"attention": [1.0], "mixer": [0.5]},
    )


@pytest.fixture(params=["flux_reference", "sd35", "z_image", "qwen_image"])
def name(request):
    from comfy.ldm.lumina.model import NextDiT

    if request.param == "z_image" and "pad_tokens_multiple" not in inspect.signature(NextDiT).parameters:
        pytest.skip("this ComfyUI is older than Z-Image")
    return request.param


def run_node(pack, model, name, size=SIZE, **changes):
    node = in_pack(pack, "nodes.convert_model").ConvertModel
    options = {"budget": "quality", "max_error": 1.0, "max_time": 0.5, "pictures": 4, "steps": 2} | changes
    latent = {"samples": torch.zeros(1, 16, *size)}
    with torch.inference_mode():
        return node.execute(model, joint_conditioning(name), latent, **options)


def test_the_model_comes_out_with_joint_mixers_and_stays_as_it_was(pack, name):
    model = make_joint(name)
    before, weights = sample_joint(model, name, SIZE), state(model)
    output = run_node(pack, model, name)
    patched, checkpoint, report = output.args
    sites = joint_sites(pack, model).channels
    assert checkpoint.mixer == "joint" and list(checkpoint.blocks) == list(sites)
    assert checkpoint.metadata["sizes"] == "16 x 24, 8 x 12"
    assert f"{len(sites)} of {len(sites)} self-attentions are replaced by joint mixers" in report
    assert 1e-6 < largest_error(sample_joint(patched, name, SIZE), before) < 0.5
    patched.detach()
    assert torch.equal(sample_joint(model, name, SIZE), before) and same_state(weights, model)


def test_only_some_blocks_and_nothing_where_nothing_is_good_enough(pack):
    model = make_joint("flux")
    _, checkpoint, _ = run_node(pack, model, "flux", blocks="single_transformer_blocks").args
    assert list(checkpoint.blocks) == [f"single_transformer_blocks.{i}.attn" for i in (0, 1)]
    assert checkpoint.kept["transformer_blocks.0.attn"] == "it was left out of the conversion"
    same, checkpoint, report = run_node(pack, model, "flux", max_error=1e-6).args
    assert same is model and not checkpoint.blocks and "above 1e-06" in report


def test_saved_loaded_and_put_on_again(pack, tmp_path):
    core = in_pack(pack, "deltaconv_core")
    model = make_joint("flux")
    patched, checkpoint, _ = run_node(pack, model, "flux").args
    core.save_checkpoint(checkpoint, tmp_path / "joint.safetensors")
    loaded = core.load_checkpoint(tmp_path / "joint.safetensors")
    node = in_pack(pack, "nodes.patch_model").PatchModel
    with torch.inference_mode():
        again = node.execute(model, "auto", "all", 0.0, 1.0, "apply", 1.0, loaded).args[0]
    assert torch.equal(sample_joint(again, "flux", SIZE), sample_joint(patched, "flux", SIZE))


def test_a_selection_that_names_no_attention_is_refused(pack):
    with pytest.raises(Exception, match="'up_blocks' matches no site"):
        run_node(pack, make_joint("flux"), "flux", blocks="up_blocks")
