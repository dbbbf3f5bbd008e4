"""Neighborhood attention on a MODEL, against attention with a mask put in by hand."""

from __future__ import annotations

import pytest
import torch

from testing.comfy_models import (
    CONTEXT_DIM,
    in_pack,
    make_pixart,
    make_unet,
    patch,
    sample,
)
from testing.comfy_patches import lora
from testing.compare import largest_error


def neighborhood(pack, model, kernel_size, blocks="all"):
    """The NodeOutput, run as ComfyUI's executor runs it."""
    node = in_pack(pack, "nodes.neighborhood").NeighborhoodAttention
    with torch.inference_mode():
        return node.execute(model, kernel_size, blocks)


def masked_by_hand(model, kernel_size, chosen=lambda name: True):
    """The model with every self-attention masked, for good and without our code."""
    for name, module in model.model.diffusion_model.named_modules():
        if name.endswith(("attn1", ".attn")) and chosen(name):
            module.forward = masked(module, kernel_size)
    return model


def masked(module, kernel_size):
    def forward(x, context=None, value=None, mask=None, transformer_options=None, HW=None, block_id=None):
        height, width = (
            (HW[0] // 2, HW[1] // 2) if HW else tuple(transformer_options["activations_shape"][-2:])
        )
        y, x_ = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        y, x_ = y.flatten(), x_.flatten()
        far = torch.maximum((y[:, None] - y).abs(), (x_[:, None] - x_).abs()) > kernel_size // 2
        if hasattr(module, "qkv"):
            q, k, v = module.qkv(x).chunk(3, dim=-1)
            q, k, heads, out = module.q_norm(q), module.k_norm(k), module.num_heads, module.proj
        else:
            q, k, v, heads, out = module.to_q(x), module.to_k(x), module.to_v(x), module.heads, module.to_out
        q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        logits = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(far, -torch.inf)
        return out((logits.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))

    return forward


@pytest.mark.parametrize("size", [(16, 16), (17, 23), (9, 40)])
@pytest.mark.parametrize("batch", [1, 2])
def test_unet_output_is_that_of_masked_attention(pack, unet, size, batch):
    cut = sample(neighborhood(pack, unet, 5).args[0], size, batch=batch)
    assert largest_error(cut, sample(masked_by_hand(make_unet(), 5), size, batch=batch)) < 1e-5
    assert largest_error(cut, sample(unet, size, batch=batch)) > 1e-3


def test_pixart_output_is_that_of_masked_attention(pack, pixart):
    size = (64, 48)
    cut = sample(neighborhood(pack, pixart, 7).args[0], size)
    assert largest_error(cut, sample(masked_by_hand(make_pixart(), 7), size)) < 1e-5
    assert largest_error(cut, sample(pixart, size)) > 1e-3


@pytest.mark.parametrize(("name", "size"), [("unet", (17, 12)), ("pixart", (48, 64))])
def test_a_window_as_large_as_the_picture_is_attention(pack, request, name, size):
    model = request.getfixturevalue(name)
    whole = sample(neighborhood(pack, model, 63).args[0], size)
    assert largest_error(whole, sample(model, size)) < 1e-5


def test_only_the_chosen_blocks(pack, unet):
    output = neighborhood(pack, unet, 3, "all,-mid,-up_blocks.1")
    assert len(output.args[0].object_patches) == 3
    assert output.ui.as_dict()["text"][0] == (
        "Neighborhood attention, 3 x 3 tokens, at 3 of 5 self-attentions of unet-32x2-64x3."
    )
    reference = masked_by_hand(
        make_unet(), 3, lambda name: not name.startswith(("middle", "output_blocks.3"))
    )
    assert largest_error(sample(output.args[0]), sample(reference)) < 1e-5


@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_on_self_attention_keeps_acting(pack, unet, order):
    cut = lambda model: neighborhood(pack, model, 5).args[0]  # noqa: E731
    model = cut(lora(unet)) if order == "before" else lora(cut(unet))
    assert largest_error(sample(model), sample(lora(masked_by_hand(make_unet(), 5)))) < 1e-5
    assert largest_error(sample(model), sample(cut(unet))) > 1e-3


@pytest.mark.parametrize(
    ("base", "manual_cast"),
    [(torch.bfloat16, None), (torch.float8_e4m3fn, torch.bfloat16)],
    ids=["bf16", "fp8 computing in bf16"],
)
def test_other_dtypes(pack, base, manual_cast):
    model = make_unet(base, manual_cast)
    own = largest_error(sample(model), sample(make_unet()))
    cut = sample(neighborhood(pack, model, 5).args[0])
    assert largest_error(cut, sample(neighborhood(pack, make_unet(), 5).args[0])) < 2 * own


def test_the_model_stays_as_it_is(pack, unet):
    expected = sample(unet)
    patches = dict(unet.object_patches)
    sample(neighborhood(pack, unet, 3).args[0])
    assert unet.object_patches == patches and not unet.wrappers
    assert torch.equal(sample(unet), expected)


def test_two_windows_on_one_model(pack, unet):
    """Each has its own sites; where both were put, the later one acts."""
    mixed = neighborhood(pack, neighborhood(pack, unet, 3).args[0], 7, "up").args[0]
    reference = masked_by_hand(masked_by_hand(make_unet(), 3), 7, lambda name: name.startswith("output"))
    assert largest_error(sample(mixed), sample(reference)) < 1e-5


def test_beside_deltaconv_in_a_part_of_the_sampling(pack, unet, checkpoint):
    """Both ask what is running, and each gets its own answer."""
    part = patch(pack, unet, checkpoint, blocks="down", end=0.5)
    both = neighborhood(pack, part, 5, "mid,up").args[0]
    reference = patch(pack, masked_by_hand(make_unet(), 5), checkpoint, blocks="down", end=0.5)
    for name in ("input_blocks.1.1", "input_blocks.3.1"):
        attention = reference.model.diffusion_model.get_submodule(f"{name}.transformer_blocks.0.attn1")
        del attention.__dict__["forward"]
    assert largest_error(sample(both), sample(reference)) < 1e-5


def test_in_place_of_deltaconv_is_said(pack, unet, checkpoint):
    output = neighborhood(pack, patch(pack, unet, checkpoint), 5, "mid")
    assert "ΔConv stood at 1 of these sites" in output.ui.as_dict()["text"][0]


def test_refusals(pack, unet):
    errors = in_pack(pack, "deltaconv_core.errors")
    with pytest.raises(errors.DeltaConvError, match="odd kernel_size of at least 1, got 4"):
        neighborhood(pack, unet, 4)
    with pytest.raises(errors.DeltaConvError, match="'side' matches no site"):
        neighborhood(pack, unet, 3, "side")
    from comfy_extras.nodes_tomesd import TomePatchModel

    from testing.comfy_models import called

    merged = called(TomePatchModel, "patch", neighborhood(pack, unet, 3).args[0], 0.5)
    with pytest.raises(errors.DeltaConvError, match="expected 64 x 64 = 4096 tokens"):
        sample(merged, (64, 64), steps=1)
    cut = neighborhood(pack, unet, 3).args[0]
    sample(cut)
    with pytest.raises(errors.DeltaConvError, match="take ΔConv Neighborhood Attention off"):
        cut.model.diffusion_model(
            torch.zeros(1, 4, 8, 8),
            torch.ones(1),
            context=torch.zeros(1, 1, CONTEXT_DIM),
            transformer_options={},
        )
