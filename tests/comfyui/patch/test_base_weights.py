"""Weights of the base model that come with published blocks."""

from __future__ import annotations

import copy

import pytest
import torch

from testing.comfy_models import (
    in_pack,
    make_checkpoint,
    make_pixart,
    make_unet,
    patch,
    run_patch_node,
    same_state,
    sample,
    state,
)
from testing.compare import largest_error

NAME = "down_blocks.1.resnets.0.conv1"
KEY = "diffusion_model.input_blocks.3.0.in_layers.2"


@pytest.fixture
def published(pack, unet, checkpoint):
    """Blocks and one convolution: half as large again as the model's, with its bias."""
    checkpoint.base_weights = {
        f"{NAME}.{part}": unet.model.state_dict()[f"{KEY}.{part}"] * 1.5 for part in ("weight", "bias")
    }
    return checkpoint


def with_factor(pack, checkpoint, factor):
    """What comes out when the convolution of the base model itself is changed."""
    model = make_unet()
    for part in ("weight", "bias"):
        model.model.state_dict()[f"{KEY}.{part}"].mul_(factor)
    return sample(patch(pack, model, checkpoint, base_weights="leave out"))


@pytest.mark.parametrize(("strength", "factor"), [(1.0, 1.5), (0.5, 1.25), (0.0, 1.0)])
def test_strength_mixes_the_two(pack, unet, published, strength, factor):
    patched = sample(patch(pack, unet, published, strength=strength))
    assert largest_error(patched, with_factor(pack, published, factor)) < 1e-5


def test_left_out(pack, unet, published):
    output = run_patch_node(pack, unet, published, base_weights="leave out")
    assert output.args[0].patches == {}
    assert torch.equal(sample(output.args[0]), with_factor(pack, published, 1.0))
    text = output.ui.as_dict()["text"][0]
    assert "2 tensors of ResNet convolutions, left out; they are 50.00% away" in text


@pytest.mark.parametrize(
    ("factor", "said"),
    [
        (1.5, f"50.00% away from the loaded model's (at most 50.00%, at {NAME}."),
        (1.0, "the same as the loaded"),
    ],
)
def test_the_difference_is_told(pack, unet, published, factor, said):
    own = unet.model.state_dict()[f"{KEY}.weight"]
    published.base_weights = {f"{NAME}.weight": own * factor}
    text = run_patch_node(pack, unet, published).ui.as_dict()["text"][0]
    assert "applied with strength 1 at every step" in text and said in text


def test_the_difference_is_to_the_model_without_any_patch(pack, unet, published):
    """Also while a clone is loaded whose patches stand in the weights."""
    first = patch(pack, unet, published)
    sample(first)
    text = run_patch_node(pack, first, published).ui.as_dict()["text"][0]
    assert "50.00% away" in text


def test_a_lora_acts_the_same_before_and_after(pack, unet, published):
    delta = {f"{KEY}.weight": (torch.full_like(unet.model.state_dict()[f"{KEY}.weight"], 0.02),)}
    before, after = unet.clone(), patch(pack, unet, published)
    before.add_patches(delta, 0.7)
    after.add_patches(delta, 0.7)
    outputs = [sample(patch(pack, before, published)), sample(after)]
    assert largest_error(*outputs) < 1e-5
    assert not torch.equal(outputs[0], sample(patch(pack, unet, published)))


@pytest.mark.parametrize("order", ["lora, merge, ΔConv", "merge, ΔConv, lora"])
def test_they_take_the_place_of_what_a_merge_made(pack, unet, published, order):
    key = f"{KEY}.weight"
    model = unet.clone()
    lora = {key: (torch.full((64, 32, 3, 3), 0.02),)}
    if order.startswith("lora"):
        model.add_patches(lora)
    model.add_patches({key: (torch.ones(64, 32, 3, 3),)}, 0.6, 0.4)
    model = patch(pack, model, published)
    if order.endswith("lora"):
        model.add_patches(lora)
    import comfy.lora

    weight = comfy.lora.calculate_weight(model.patches[key], unet.model.state_dict()[key].clone(), key)
    expected = published.base_weights[f"{NAME}.weight"] + (0.02 if order.endswith("lora") else 0)
    torch.testing.assert_close(weight, expected)


def test_patching_again_takes_the_earlier_ones_away(pack, unet, published, checkpoint):
    lora = unet.clone()
    lora.add_patches({f"{KEY}.bias": (torch.ones(64),)})
    twice = patch(pack, patch(pack, lora, published), published)
    assert {k: len(p) for k, p in twice.patches.items()} == {f"{KEY}.weight": 1, f"{KEY}.bias": 2}
    bare = copy.copy(published)
    bare.base_weights = {}
    assert {k: len(p) for k, p in patch(pack, twice, bare).patches.items()} == {f"{KEY}.bias": 1}


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("down_blocks.5.resnets.0.conv1.weight", (64, 32, 3, 3), "no such weight"),
        (f"{NAME}.weight", (64, 32, 1, 1), r"\(64, 32, 1, 1\), this MODEL .* has \(64, 32, 3, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused_unless_left_out(pack, unet, checkpoint, name, shape, message):
    core = in_pack(pack, "deltaconv_core")
    checkpoint.base_weights = {name: torch.ones(shape)}
    with pytest.raises(core.DeltaConvError, match=message):
        run_patch_node(pack, unet, checkpoint)
    output = run_patch_node(pack, unet, checkpoint, base_weights="leave out")
    assert "they do not fit" in output.ui.as_dict()["text"][0]


def test_a_model_without_convolutions(pack):
    core = in_pack(pack, "deltaconv_core")
    model = make_pixart()
    checkpoint = make_checkpoint(pack, model)
    checkpoint.base_weights = {f"{NAME}.weight": torch.ones(1)}
    with pytest.raises(core.DeltaConvError, match="dit-48x2.*no such weight"):
        run_patch_node(pack, model, checkpoint)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_smaller_base_dtypes(pack, dtype):
    model = make_unet(dtype, torch.float32)
    before = state(model)
    checkpoint = make_checkpoint(pack, model)
    checkpoint.base_weights = {f"{NAME}.weight": before[f"{KEY}.weight"].float() * 1.5}
    output = run_patch_node(pack, model, checkpoint)
    assert "50.00% away" in output.ui.as_dict()["text"][0]
    assert not torch.equal(
        sample(output.args[0]), sample(patch(pack, model, checkpoint, base_weights="leave out"))
    )
    model.detach()
    assert same_state(before, model)


# ---- MODELs whose stored numbers are not the weights ----


class Packed(torch.Tensor):
    """As loaders of packed weights have it: bytes inside, the true shape outside."""

    @staticmethod
    def __new__(cls, data, true):
        return torch.Tensor._make_subclass(cls, data, False)

    def __init__(self, data, true):
        self.true = true

    @property
    def shape(self):
        return self.true

    def detach(self):
        return self


def packed(weight):
    """34 bytes for 32 numbers."""
    data = torch.zeros(weight.numel() // 32 * 34, dtype=torch.uint8)
    return torch.nn.Parameter(Packed(data, weight.shape), requires_grad=False)


def in_rows(weight):
    """Two numbers in a byte, in a parameter of the ordinary class."""
    data = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
    return torch.nn.Parameter(data, requires_grad=False)


def as_integers(weight):
    """The scale is elsewhere."""
    return torch.nn.Parameter((weight * 100).to(torch.int8), requires_grad=False)


class OfItsOwnClass(torch.nn.Parameter):
    pass


def of_its_own_class(weight):
    return OfItsOwnClass(weight.clone(), requires_grad=False)


KINDS = [packed, in_rows, as_integers, of_its_own_class]


def stored(kind, *names):
    """A U-Net whose convolution is stored in this way."""
    model = make_unet()
    layer = model.model.get_submodule(KEY)
    for name in names:
        layer._parameters[name] = kind(getattr(layer, name))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_are_not_taken_for_numbers(pack, published, kind):
    core = in_pack(pack, "deltaconv_core")
    model = stored(kind, "weight", "bias")
    before = dict(model.patches)
    with pytest.raises(
        core.DeltaConvError, match="stores its own packed .*; set base_weights to 'leave out'"
    ):
        run_patch_node(pack, model, published)
    output = run_patch_node(pack, model, published, base_weights="leave out")
    assert "left out; they were not compared" in output.ui.as_dict()["text"][0]
    assert model.patches == output.args[0].patches == before


def test_those_that_are_numbers_are_compared(pack, published):
    text = run_patch_node(pack, stored(packed, "weight"), published, base_weights="leave out").ui.as_dict()
    assert "left out; they are 50.00% away" in text["text"][0]


def test_a_loader_that_unpacks_before_it_patches_gets_the_patches(pack, unet, published):
    import comfy.model_patcher

    class Unpacking(comfy.model_patcher.ModelPatcher):
        def patch_weight_to_device(self, key, device_to=None, inplace_update=False):
            pass

    model = stored(packed, "weight")
    model = Unpacking(model.model, model.load_device, model.offload_device)
    clone = run_patch_node(pack, model, published, strength=0.5).args[0]
    assert type(clone) is Unpacking
    assert {key: (p[0][0], p[0][2]) for key, p in clone.patches.items()} == {
        f"{KEY}.{part}": (0.5, 0.5) for part in ("weight", "bias")
    }
    core = in_pack(pack, "deltaconv_core")
    published.base_weights = {f"{NAME}.weight": torch.ones(64, 32, 1, 1)}
    with pytest.raises(core.DeltaConvError, match="stores its own packed"):
        run_patch_node(pack, model, published)
