"""ΔConv Convert Model on small MODELs, with times that the tests set."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from testing.comfy_models import (
    conditioning,
    in_pack,
    make_pixart,
    make_unet,
    patch,
    same_state,
    sample,
    state,
    untouched,
)
from testing.comfy_patches import compiled, lora, pag
from testing.compare import largest_error

MAKERS = {"unet": make_unet, "pixart": make_pixart}
SIZES = {"unet": (16, 12), "pixart": (48, 44)}


@pytest.fixture(autouse=True)
def times(pack, monkeypatch):
    """Every mixer is faster than attention, those with more landmarks less so."""

    def alternate(runs, device, repeats, check=lambda: None):
        check()
        return {name: [0.01 * (int(name) or 20)] for name in runs}

    module = in_pack(pack, "deltaconv_core.distill.conversion")
    monkeypatch.setattr(module, "alternate", alternate)
    return module


@pytest.fixture(params=MAKERS)
def kind(request):
    return request.param


def run_node(pack, model, size=(16, 12), negative=True, **changes):
    node = in_pack(pack, "nodes.convert_model").ConvertModel
    options = {"budget": "quality", "max_error": 1.0, "max_time": 0.5, "pictures": 4, "steps": 2} | changes
    latent = {"samples": torch.zeros(1, 4, *size)}
    given = {"negative": conditioning(2)} if negative else {}
    with torch.inference_mode():
        return node.execute(model, conditioning(1), latent, **given, **options)


def test_the_model_comes_out_with_the_mixers_on_it_and_stays_as_it_was(pack, kind):
    model, size = MAKERS[kind](), SIZES[kind]
    plain = sample(model, size)
    with untouched(model, size):
        patched, checkpoint, report = run_node(pack, model, size).args
        own = sample(patched, size)
        patched.detach()
    assert checkpoint.mixer == "hybrid" and checkpoint.blocks
    assert 1e-5 < largest_error(own, plain) < 0.5
    assert torch.equal(own, sample(patch(pack, model, checkpoint), size))
    assert f"{len(checkpoint.blocks)} of {len(checkpoint.blocks | checkpoint.kept)} self-att" in report
    pixels = f"{8 * size[1]} x {8 * size[0]}, 2 steps"
    assert f"A picture of {pixels}" in report


def test_the_report_is_shown_on_the_node(pack, unet):
    output = run_node(pack, unet)
    assert output.ui.as_dict()["text"][0] == output.args[2]
    assert "| down0.0 |" in output.args[2]


def test_guidance_makes_no_difference_to_the_mixers_that_are_fitted(pack, unet):
    """Nor do compiled code, ΔConv and what acts on guidance: the attention itself is looked at."""
    first = run_node(pack, unet).args[1]
    for model in (compiled(unet), pag(unet), run_node(pack, unet).args[0]):
        again = run_node(pack, model).args[1]
        assert first.blocks.keys() == again.blocks.keys()
        for site, mixer in first.blocks.items():
            other = again.blocks[site].state_dict()
            assert all(torch.equal(tensor, other[name]) for name, tensor in mixer.state_dict().items())


@pytest.mark.parametrize("change", [{"calibration_seed": 1}, {"negative": False}, {"steps": 3}])
def test_what_is_drawn_decides_the_mixers(pack, unet, change):
    first, other = (run_node(pack, unet, **options).args[1] for options in ({}, change))
    gains = [[float(mixer.gain[0]) for mixer in one.blocks.values()] for one in (first, other)]
    assert gains[0] != gains[1]


def test_only_some_blocks(pack, unet):
    patched, checkpoint, _ = run_node(pack, unet, blocks="up").args
    assert {site.split(".")[0] for site in checkpoint.blocks} == {"up_blocks"}
    assert checkpoint.kept["mid_block.attentions.0.transformer_blocks.0.attn1"].startswith("it was left out")
    assert sample(patched).isfinite().all()


def test_where_nothing_pays_the_model_comes_out_as_it_came_in(pack, unet, times, monkeypatch):
    monkeypatch.setattr(times, "alternate", lambda runs, *_: {name: [0.1] for name in runs})
    patched, checkpoint, report = run_node(pack, unet).args
    assert patched is unet and not checkpoint.blocks and "0 of 5 self-attentions" in report
    assert "attention is cheap here" in report
    with pytest.raises(Exception, match=r"holds no block.* convert at a larger size"):
        in_pack(pack, "nodes.save_weights").SaveWeights.execute(checkpoint, "none", "fp16")
    with pytest.raises(Exception, match=r"hold no block.* convert at a larger size"):
        patch(pack, unet, checkpoint)


def test_lora_on_the_model_acts_and_is_fitted(pack, unet):
    with_lora = lora(unet)
    patched, checkpoint, _ = run_node(pack, with_lora).args
    assert largest_error(sample(patched), sample(run_node(pack, unet).args[0])) > 1e-4
    assert torch.equal(sample(patched), sample(lora(patch(pack, unet, checkpoint))))


@pytest.fixture
def models(pack):
    """The model folder, empty before and after."""
    import folder_paths

    path = Path(folder_paths.get_folder_paths("deltaconv")[0])
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    yield path
    shutil.rmtree(path)


def test_saved_and_loaded_by_the_nodes_and_by_the_list_of_weights(pack, unet, models):
    patched, checkpoint, _ = run_node(pack, unet).args
    in_pack(pack, "nodes.save_weights").SaveWeights.execute(checkpoint, "mine", "fp32", title="a test")
    (file,) = models.iterdir()
    assert file.stat().st_size < 20_000
    output = in_pack(pack, "nodes.load_weights").LoadWeights.execute(file.name)
    loaded = output.args[0]
    assert f"{len(checkpoint.blocks)} hybrid mixers for unet-32x2-64x3" in output.ui.as_dict()["text"][0]
    assert loaded.metadata["training"].startswith("none; fitted to 4 pictures")
    wanted = sample(patched)
    assert torch.equal(sample(patch(pack, unet, loaded)), wanted)
    record = {
        "name": file.stem, "title": "a test", "architecture": "unet-32x2-64x3", "base_model": "none",
        "recommended_for": ["unet-32x2-64x3"], "source": {"url": f"https://example.com/{file.name}"},
        "size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "form": {"gate": None, "scales": None, "pooling": None}, "licence": "unknown", "citation": "none",
        "note": "Nothing.",
    }  # fmt: skip
    (models / "manifest.json").write_text(json.dumps([record]))
    assert torch.equal(sample(patch(pack, unet, None)), wanted)


def test_a_fine_tune_takes_the_file_and_another_model_does_not(pack, unet):
    checkpoint = run_node(pack, unet).args[1]
    tuned = make_unet()
    for parameter in tuned.model.diffusion_model.parameters():
        parameter.data.mul_(1.01)
    assert sample(patch(pack, tuned, checkpoint)).isfinite().all()
    with pytest.raises(Exception, match="the weights are for unet-32x2-64x3"):
        patch(pack, make_unet(channel_mult=[1, 1]), checkpoint)


def test_a_stop_leaves_nothing_behind(pack, unet, monkeypatch):
    import comfy.model_management

    calls = []

    def interrupted():
        calls.append(1)
        if len(calls) == 12:
            raise comfy.model_management.InterruptProcessingException()

    before = state(unet)
    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", interrupted)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run_node(pack, unet)
    monkeypatch.undo()
    for module in unet.model.modules():
        own = type(module).forward.__get__(module)
        assert module.__dict__.get("forward", own) == own
    assert not unet.object_patches and same_state(before, unet)


def test_progress_is_shown_to_the_end(pack, unet, monkeypatch):
    import comfy.utils

    seen = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: seen.append((value, total))
    )
    run_node(pack, unet, steps=3)
    ours = [value for value, total in seen if total == 12]
    assert ours[-1] == 12 and ours == sorted(ours)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(pack, dtype):
    model = make_unet(dtype)
    patched, checkpoint, _ = run_node(pack, model).args
    assert checkpoint.blocks and sample(patched).isfinite().all()
    plain = sample(model).float()
    assert (sample(patched).float() - plain).norm() / plain.norm() < 0.5


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda pack: make_unet(), {"blocks": "side"}, "'side' matches no site"),
        (lambda pack: make_unet(), {"pictures": 3}, "at least 4 calibration pictures"),
        (lambda pack: make_unet(), {"budget": "speed", "max_time": 2.0}, "time budget above 0 and at most 1"),
    ],
    ids=["blocks", "pictures", "budget"],
)
def test_refusals(pack, model, options, message):
    with pytest.raises(Exception, match=message):
        run_node(pack, model(pack), **options)
