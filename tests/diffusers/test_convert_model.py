"""Converting tiny pipelines of diffusers' own classes, by the library and by the command."""

from __future__ import annotations

import inspect

import pytest
import torch

from deltaconv_core import DeltaConvError, load_checkpoint
from deltaconv_core.cli import main
from deltaconv_core.diffusers import applied, apply, remove
from deltaconv_core.diffusers.conversion import Pictures, convert
from deltaconv_core.diffusers.sites import network_of
from deltaconv_core.distill import conversion
from deltaconv_core.distill.conversion import Wishes
from testing.diffusers_models import make_pipeline, make_pixart_pipeline, sample

SIZE = {"width": 32, "height": 24}


@pytest.fixture(autouse=True)
def times(monkeypatch):
    """Every mixer is faster than attention, those with more landmarks less so."""

    def alternate(runs, device, repeats, check=lambda: None):
        return {name: [0.01 * (int(name) or 20)] for name in runs}

    monkeypatch.setattr(conversion, "alternate", alternate)


@pytest.fixture(params=[make_pipeline, make_pixart_pipeline], ids=["sd", "pixart"])
def pipeline(request, tmp_path):
    return request.param(tmp_path)


def pictures(*prompts):
    return Pictures(prompts or ("a cat",), "dog", steps=2, **SIZE)


def draw(pipeline):
    more = {} if hasattr(pipeline, "unet") else {"use_resolution_binning": False}
    return sample(pipeline, **more)


def test_what_is_fitted_stands_on_the_pipeline_which_was_left_alone(pipeline, tmp_path):
    before = draw(pipeline)
    found, result = convert(pipeline, pictures(), Wishes(limit=1.0, pictures=4))
    assert torch.equal(draw(pipeline), before)
    assert not any(module._forward_pre_hooks for module in network_of(pipeline).modules())
    checkpoint = result.checkpoint(found.architecture, found.channels, {})
    apply(pipeline, checkpoint)
    assert applied(pipeline).mixer == "hybrid" and not torch.equal(draw(pipeline), before)
    with pytest.raises(DeltaConvError, match="take it off with `remove`"):
        convert(pipeline, pictures(), Wishes())
    remove(pipeline)
    assert torch.equal(draw(pipeline), before)


def test_prompts_are_taken_in_turn(pipeline, monkeypatch):
    drawn = []
    call = type(pipeline).__call__

    def noting(self, prompt, **options):
        drawn.append((prompt, options["generator"].initial_seed()))
        return call(self, prompt, **options)

    noting.__signature__ = inspect.signature(call)
    monkeypatch.setattr(type(pipeline), "__call__", noting)
    convert(pipeline, pictures("a cat", "a dog", "a hat"), Wishes(limit=1.0, pictures=4, seed=7))
    assert drawn == [("a cat", 7), ("a dog", 8), ("a hat", 9), ("a cat", 10)]


def test_the_command(pipeline, tmp_path, capsys):
    pipeline.save_pretrained(tmp_path / "model")
    file = tmp_path / "hybrid.safetensors"
    arguments = ["convert-model", "--model", str(tmp_path / "model"), "--output", str(file)]
    arguments += ["--size", "32x32", "--pictures", "4", "--steps", "2", "--max-error", "1", "--device", "cpu"]
    assert main([*arguments, "--prompt", "a cat", "a dog", "--license", "MIT"]) == 0
    printed = capsys.readouterr()
    assert (
        "self-attentions are replaced by hybrid mixers" in printed.out and f"Written to {file}" in printed.out
    )
    assert "picture 4 of 4" in printed.err
    loaded = load_checkpoint(file)
    assert loaded.mixer == "hybrid" and loaded.metadata["license"] == "MIT"
    assert loaded.metadata["teacher"].startswith("model ")
    assert main(["inspect", str(file)]) == 0
    assert f"hybrid mixers: {len(loaded.blocks)}" in capsys.readouterr().out
    plain = draw(pipeline)
    apply(pipeline, file)
    assert not torch.equal(draw(pipeline), plain)
    assert main([*arguments, "--seed", "0", "--prompt", "a cat", "a dog"]) == 0
    again = load_checkpoint(file)
    for site, mixer in loaded.blocks.items():
        other = again.blocks[site].state_dict()
        assert all(torch.equal(tensor, other[name]) for name, tensor in mixer.state_dict().items())


def test_where_nothing_pays_no_file_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(conversion, "alternate", lambda runs, *_: {name: [0.1] for name in runs})
    make_pipeline(tmp_path).save_pretrained(tmp_path / "model")
    arguments = ["--size", "32", "--pictures", "4", "--steps", "1", "--device", "cpu"]
    file = tmp_path / "hybrid.safetensors"
    assert main(["convert-model", "--model", str(tmp_path / "model"), "--output", str(file), *arguments]) == 2
    printed = capsys.readouterr()
    assert "attention is cheap here" in printed.out and "no mixer pays at 32 x 32" in printed.err
    assert not file.exists()


@pytest.mark.parametrize("prompts", ["a cat", ()])
def test_prompts_are_a_list(prompts):
    with pytest.raises(DeltaConvError, match="expected a list of prompts"):
        Pictures(prompts)


@pytest.mark.parametrize(("steps", "seed", "message"), [(0, 0, "one step, got 0"), (1, 2**64, "a seed from")])
def test_what_no_picture_can_be_drawn_with_is_refused(tmp_path, steps, seed, message):
    with pytest.raises(DeltaConvError, match=message):
        convert(make_pipeline(tmp_path), Pictures(("a cat",), steps=steps, **SIZE), Wishes(seed=seed))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --model"),
        (["--model", "none"], "expected --output"),
        (["--model", "none", "--output", "x.safetensors"], "the folder of a diffusers pipeline"),
        (["--model", "none", "--output", "x", "--max-time", "0.5", "--max-error", "0.1"], "got both"),
        (["--model", "none", "--output", "x", "--max-time", "3"], "time budget above 0 and at most 1"),
        (["--model", "none", "--output", "none/x.safetensors"], "--output: cannot write to"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["convert-model", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
