"""Weights of the base model that come with published blocks."""

from __future__ import annotations

import pytest
import torch

from deltaconv_core import DeltaConvError, save_checkpoint
from deltaconv_core.diffusers import apply, remove
from testing.compare import largest_error
from testing.diffusers_models import by_hand, make, run

LAYER = "down_blocks.1.resnets.0.conv1"


@pytest.fixture
def published(sd):
    """Half as large again as the model's."""
    layer = sd.model.get_submodule(LAYER)
    sd.checkpoint.base_weights = {
        f"{LAYER}.{name}": getattr(layer, name) * 1.5 for name in ("weight", "bias")
    }
    return sd


def expected(case, factor):
    """What comes out when the convolution of the model itself is changed."""
    model = case.fresh()
    for parameter in model.get_submodule(LAYER).parameters():
        parameter.mul_(factor)
    return run(by_hand(model, case.checkpoint, (16, 12)))


def bits(model):
    layer = model.get_submodule(LAYER)
    return [(name, id(p), p.data_ptr(), p.tolist()) for name, p in layer.named_parameters()]


@pytest.mark.parametrize(("strength", "factor"), [(1.0, 1.5), (0.5, 1.25), (0.0, 1.0)])
def test_strength_mixes_the_two(published, strength, factor):
    before = bits(published.model)
    apply(published.model, published.checkpoint, base_weights_strength=strength)
    assert largest_error(run(published.model), expected(published, factor)) < 1e-5
    remove(published.model)
    assert bits(published.model) == before


@pytest.mark.parametrize(
    ("strength", "said"),
    [
        (
            1.0,
            "2 tensors of ResNet convolutions, applied with strength 1 at every step; they are 50.00% away",
        ),
        (0.0, "2 tensors of ResNet convolutions, left out; they are 50.00% away"),
    ],
)
def test_the_difference_is_told_also_on_a_patched_model(published, strength, said):
    for _ in range(2):
        assert said in apply(published.model, published.checkpoint, base_weights_strength=strength).text


def test_applying_again_starts_from_the_models_own(published):
    before = bits(published.model)
    apply(published.model, published.checkpoint)
    apply(published.model, published.checkpoint, base_weights_strength=0.5)
    assert largest_error(run(published.model), expected(published, 1.25)) < 1e-5
    published.checkpoint.base_weights = {}
    apply(published.model, published.checkpoint)
    assert bits(published.model) == before


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("down_blocks.5.resnets.0.conv1.weight", (1,), "no such weight; pass base_weights_strength=0"),
        (
            f"{LAYER}.weight",
            (2, 2),
            r"of shape \(2, 2\), this model \(UNet2DConditionModel\) has \(32, 16, 3, 3\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_unless_left_out(published, name, shape, message):
    apply(published.model, published.checkpoint)
    output = run(published.model)
    published.checkpoint.base_weights[name] = torch.ones(shape)
    with pytest.raises(DeltaConvError, match=message):
        apply(published.model, published.checkpoint)
    assert torch.equal(run(published.model), output)
    told = apply(published.model, published.checkpoint, base_weights_strength=0.0)
    assert "left out; they do not fit" in told.text


def test_the_models_own_come_back_in_the_dtype_of_then(published):
    apply(published.model, published.checkpoint)
    published.model.to(torch.bfloat16)
    remove(published.model)
    assert torch.equal(run(published.model), run(make("sd").to(torch.bfloat16)))


def test_under_inference_mode(published, tmp_path):
    save_checkpoint(published.checkpoint, tmp_path / "weights.safetensors")
    with torch.inference_mode():
        apply(published.model, tmp_path / "weights.safetensors")
    assert not any(parameter.is_inference() for parameter in published.model.parameters())
    assert not any(
        p.is_inference() for block in published.model.deltaconv.blocks.values() for p in block.parameters()
    )
    with torch.inference_mode():
        remove(published.model)
    published.model.get_submodule(LAYER).requires_grad_(True)
    published.model(torch.ones(1, 4, 8, 8), 5, torch.ones(1, 5, 16)).sample.sum().backward()


class OfItsOwnClass(torch.nn.Parameter):
    pass


@pytest.mark.parametrize(
    "stored",
    [
        lambda weight: torch.nn.Parameter((weight * 100).to(torch.int8), requires_grad=False),
        lambda weight: OfItsOwnClass(weight.detach().clone(), requires_grad=False),
        lambda weight: torch.nn.Parameter(torch.zeros(9, 1, dtype=torch.uint8), requires_grad=False),
    ],
    ids=["integers", "a class of its own", "packed rows"],
)
def test_packed_weights_are_not_taken_for_numbers(published, stored):
    layer = published.model.get_submodule(LAYER)
    kept = layer._parameters["weight"] = stored(layer.weight)
    published.checkpoint.base_weights = {f"{LAYER}.weight": torch.ones(32, 16, 3, 3)}
    with pytest.raises(DeltaConvError, match="stores its own packed .* pass base_weights_strength=0"):
        apply(published.model, published.checkpoint)
    told = apply(published.model, published.checkpoint, base_weights_strength=0.0)
    assert "left out; they were not compared" in told.text
    assert layer.weight is kept
