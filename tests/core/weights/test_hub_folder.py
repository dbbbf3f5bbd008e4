"""The folder for the Hub: whole or not there, its parts agree, and no text breaks out of its card."""

from __future__ import annotations

import json

import pytest
import yaml
from safetensors.torch import load_file, save_file

from deltaconv_core import CheckpointError, load_checkpoint, save_checkpoint
from deltaconv_core.cli import main
from deltaconv_core.weights.hub_folder import save_hub_folder
from testing.checkpoints import assert_same, small_checkpoint

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    save_hub_folder(small_checkpoint(), tmp_path / "weights")
    return tmp_path / "weights"


def card_of(checkpoint, folder):
    """(front matter, the rest) of the card."""
    save_hub_folder(checkpoint, folder)
    start, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert start == ""
    return yaml.safe_load(front), text


def test_round_trip_is_exact(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", WEIGHTS]
    assert list(folder.parent.iterdir()) == [folder]
    for path in (folder, str(folder), folder / WEIGHTS):
        assert_same(load_checkpoint(path), small_checkpoint())


def test_the_weights_are_a_file_of_our_own(folder, tmp_path):
    save_checkpoint(small_checkpoint(), tmp_path / "own.safetensors")
    assert (folder / WEIGHTS).read_bytes() == (tmp_path / "own.safetensors").read_bytes()


def test_config_says_what_there_is(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    checkpoint = small_checkpoint()
    assert config == {
        "_class_name": "DeltaConvCheckpoint",
        "format": 1,
        "architecture": checkpoint.architecture,
        "specs": {site: block.spec.to_dict() for site, block in checkpoint.blocks.items()},
        "metadata": checkpoint.metadata,
    }


@pytest.mark.parametrize(
    ("license", "expected"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        (" creativeml-openrail-m ", {"license": "creativeml-openrail-m"}),
        ("My Terms: v2\n---\nlicense: mit", {"license": "other", "license_name": "my-terms-v2-license-mit"}),
        ("", {}),
    ],
)
@pytest.mark.parametrize(
    ("base_model", "more"),
    [
        ("Lykon/DreamShaper", {"base_model": "Lykon/DreamShaper", "base_model_relation": "adapter"}),
        ("a folder of mine/model.safetensors\n", {}),
    ],
)
def test_front_matter(tmp_path, license, expected, base_model, more):
    checkpoint = small_checkpoint()
    checkpoint.metadata |= {"license": license, "base_model": base_model}
    front, _ = card_of(checkpoint, tmp_path / "weights")
    assert front.pop("library_name") == "deltaconv" and "deltaconv" in front.pop("tags")
    assert front.pop("pipeline_tag") == "text-to-image"
    assert front == expected | more


def test_the_card_tells_all_of_the_metadata(tmp_path):
    front, text = card_of(small_checkpoint(), tmp_path / "weights")
    assert "license" not in front and "| license | not stated |" in text
    assert "# ΔConv for unet\\-8x1\\-12x1\n" in text
    assert "| teacher | a model |\n| steps | 10 |\n" in text and WEIGHTS in text
    checkpoint = small_checkpoint()
    checkpoint.metadata |= {"title": "My weights", "license": "MIT"}
    _, text = card_of(checkpoint, tmp_path / "other")
    assert "# My weights\n" in text and "| license | MIT |" in text


def test_hostile_texts_stay_in_their_cells(tmp_path):
    checkpoint = small_checkpoint()
    texts = {
        "title": "x\n---\nevil: 1\n# <script>alert(1)</script>",
        "a|b": "![t](http://track) | c | `d` [e](javascript:f) \x1b[31m &lt; \u2028 http://g",
    }
    checkpoint.metadata = texts
    front, text = card_of(checkpoint, tmp_path / "weights")
    assert "evil" not in front and "\\<script\\>" in text and "\x1b" not in text
    (row,) = [line for line in text.splitlines() if line.startswith("| a\\|")]
    assert row.startswith("| a\\|b | \\!\\[t\\]\\(http\\://track\\) \\| c \\| \\`d\\`") and row.endswith(" |")
    assert load_checkpoint(tmp_path / "weights").metadata == texts


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no readable config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "no readable config.json"),
        (lambda folder: (folder / WEIGHTS).unlink(), f"there is no file .*{WEIGHTS}"),
        (
            lambda folder: (folder / "config.json").write_text("{}"),
            f"config.json and the header of {WEIGHTS} do not say the same",
        ),
        (
            lambda folder: save_file(load_file(folder / WEIGHTS), folder / WEIGHTS),
            "expected its header to be an object",
        ),
        (
            lambda folder: save_checkpoint(small_checkpoint_of_another(), folder / WEIGHTS),
            "do not say the same",
        ),
    ],
)
def test_parts_that_do_not_belong_together(folder, spoil, message):
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def small_checkpoint_of_another():
    checkpoint = small_checkpoint()
    checkpoint.metadata["teacher"] = "another model"
    return checkpoint


def test_nothing_is_overwritten(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for target in (folder, folder / "README.md"):
        with pytest.raises(CheckpointError, match="holds something already; name a new or empty folder"):
            save_hub_folder(small_checkpoint(1), target)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_empty_folder_will_do(tmp_path):
    (tmp_path / "weights").mkdir()
    save_hub_folder(small_checkpoint(), tmp_path / "weights")
    assert_same(load_checkpoint(tmp_path / "weights"), small_checkpoint())


@pytest.mark.parametrize("place", ["missing/weights", "weights"])
def test_nothing_is_left_of_what_could_not_be_written(tmp_path, place):
    checkpoint = small_checkpoint()
    if place == "weights":
        checkpoint.architecture = "sdxl"
    with pytest.raises(CheckpointError, match=r"cannot write .*missing|sdxl has no such site"):
        save_hub_folder(checkpoint, tmp_path / place)
    assert list(tmp_path.iterdir()) == []


def test_convert_there_and_back(tmp_path, capsys):
    own, folder, back = (str(tmp_path / name) for name in ("own.safetensors", "folder", "back.safetensors"))
    save_checkpoint(small_checkpoint(), own)
    options = ["--form", "diffusers", "--metadata", "license=MIT", "--metadata", "base_model=owner/name=1"]
    assert main(["convert", own, folder, *options]) == 0
    assert capsys.readouterr().out == f"wrote 2 blocks of unet-8x1-12x1 to {folder}\n"
    assert main(["convert", folder, back]) == 0
    expected = small_checkpoint()
    expected.metadata |= {"license": "MIT", "base_model": "owner/name=1"}
    assert_same(load_checkpoint(back), expected)
    assert main(["convert", own, folder, "--form", "diffusers"]) == 2
    assert "name a new or empty folder" in capsys.readouterr().err
    assert main(["inspect", folder]) == 0 and "license: MIT" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["convert", own, folder, "--metadata", "license"])
    assert "expected NAME=TEXT, got 'license'" in capsys.readouterr().err
