"""Our blocks in the authors' form: what they would read is what we have, and what does not fit is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from deltaconv_core import BlockSpec, Checkpoint, CheckpointError, DeltaConvBlock, load_checkpoint
from deltaconv_core.cli import main
from deltaconv_core.weights.authors_write import save_authors
from testing.authors_block import conv2d, release
from testing.authors_twin import DOWN, MID, RESNET, Twin, assert_same_outputs, write


def checkpoint_of(architecture="unet-8x1-16x1", **changes):
    blocks = {f"{DOWN}.attn1": (8, 5), f"{MID}.attn1": (16, 3)}
    base = {f"{RESNET}.weight": torch.randn(8, 4, 3, 3), f"{RESNET}.bias": torch.randn(8)}
    specs = {site: BlockSpec(*shape, **changes) for site, shape in blocks.items()}
    made = {site: DeltaConvBlock(spec) for site, spec in specs.items()}
    return Checkpoint(architecture, made, base, {"teacher": "a model"})


@pytest.mark.parametrize(
    "form",
    [{}, {"gate": "sigmoid"}, {"scales": (1.0,)}, {"scales": (1.0, 0.5, 0.25), "gate": "sigmoid"}],
)
def test_back_and_forth(tmp_path, form):
    checkpoint = checkpoint_of(**form)
    save_authors(checkpoint, tmp_path / "a.safetensors")
    again = load_checkpoint(tmp_path / "a.safetensors")
    assert again.architecture == checkpoint.architecture and again.metadata["teacher"] == "a model"
    for site, block in checkpoint.blocks.items():
        assert again.blocks[site].spec == block.spec
        for name, tensor in block.state_dict().items():
            assert torch.equal(again.blocks[site].state_dict()[name], tensor)
    assert again.base_weights.keys() == checkpoint.base_weights.keys()
    assert all(torch.equal(again.base_weights[name], t) for name, t in checkpoint.base_weights.items())


def test_keys_and_shapes_are_those_of_the_release(tmp_path):
    twins = {DOWN: Twin(8, 5), MID: Twin(16, 3)}
    extra = {f"{RESNET}.weight": torch.randn(8, 4, 3, 3), f"{RESNET}.bias": torch.randn(8)}
    paths = [str(tmp_path / name) for name in ("theirs.safetensors", "back.safetensors")]
    write(paths[0], twins, release, extra=extra)
    assert main(["convert", *paths, "--as", "authors"]) == 0
    files = [safe_open(path, "pt") for path in paths]
    assert set(files[0].keys()) == set(files[1].keys())
    for name in files[0].keys():  # noqa: SIM118
        assert torch.equal(files[0].get_tensor(name), files[1].get_tensor(name))
    assert files[1].metadata() == {"gate": "simple", "scales": "[1.0, 0.5]", "pooling": "average"}


def test_the_authors_other_forms_become_their_release(tmp_path):
    twins = {DOWN: Twin(8, 5), MID: Twin(16, 3)}
    write(tmp_path / "twin.safetensors", twins, conv2d, "base_ema:")
    out = tmp_path / "release.safetensors"
    assert main(["convert", str(tmp_path / "twin.safetensors"), str(out), "--form", "authors"]) == 0
    with safe_open(out, "pt") as file:
        assert tuple(file.get_tensor(f"{DOWN}.conv1.gates.0.conv_spatial.weight").shape) == (5, 5, 4)
        assert tuple(file.get_tensor(f"{DOWN}.conv1.conv_up.weight").shape) == (4, 8)
    assert_same_outputs(load_checkpoint(out), twins, "simple", (1, 0.5))


def another_scale(checkpoint):
    checkpoint.blocks[f"{MID}.attn1"] = DeltaConvBlock(BlockSpec(16, 3, (1.0, 0.25)))


def another_site(checkpoint):
    checkpoint.blocks["mid_block.attention"] = checkpoint.blocks.pop(f"{MID}.attn1")


def another_weight(checkpoint):
    checkpoint.base_weights["conv_in.weight"] = torch.ones(1)


def empty(checkpoint):
    checkpoint.blocks.clear()


@pytest.mark.parametrize(
    ("changes", "spoil", "message"),
    [
        (
            {"merge": "sum"},
            None,
            f"block at {DOWN}.attn1: merge 'sum' .it has 'concat'",
        ),
        ({"pooling": "bilinear"}, None, "pooling 'bilinear' .it has 'average'"),
        ({"depthwise_bias": True}, None, "depthwise_bias True .it has False"),
        ({"gate": "scaled"}, None, "gate 'scaled' .it has 'simple' and 'sigmoid'"),
        ({"ratio": 0.25}, None, "2 inner channels .it has half of the 8"),
        ({}, another_scale, r"simple \(1.0, 0.5\) at down.*; simple \(1.0, 0.25\) at mid"),
        ({}, empty, "these have none"),
        ({}, another_site, "no name for the site mid_block.attention"),
        ({}, another_weight, "no place for conv_in.weight"),
        ({"architecture": "sd21"}, None, "would be read as unet-8x1-16x1, not as sd21"),
    ],
)
def test_what_it_cannot_hold(tmp_path, changes, spoil, message):
    checkpoint = checkpoint_of(**changes)
    if spoil:
        spoil(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        save_authors(checkpoint, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []
