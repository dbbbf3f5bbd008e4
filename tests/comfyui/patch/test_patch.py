"""ΔConv on a MODEL: the right answer, the base model untouched, refusals that name both sides."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

from testing.comfy_models import (
    by_hand,
    called,
    conditioning,
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

SIGMA = 5.0


def apply(model, size, batch=1, sigma=SIGMA):
    """One call of the network, as ComfyUI's sampler makes it, with every patch of the MODEL in place."""
    import comfy.model_management
    import comfy.sampler_helpers
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning(1), conditioning(2))
    guider.set_cfg(3.0)
    sigmas = torch.tensor([sigma, 0.0])
    noise = torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        return guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas)


@pytest.mark.parametrize("size", [(16, 16), (17, 23), (9, 31), (2, 40)])
@pytest.mark.parametrize("batch", [1, 3])
def test_unet_output_is_that_of_blocks_put_in_by_hand(pack, unet, checkpoint, size, batch):
    patched = apply(patch(pack, unet, checkpoint), size, batch)
    assert largest_error(patched, apply(by_hand(make_unet(), checkpoint), size, batch)) < 1e-5
    assert largest_error(patched, apply(unet, size, batch)) > 1e-3


@pytest.mark.parametrize("size", [(64, 48), (34, 66)])
def test_pixart_output_is_that_of_blocks_put_in_by_hand(pack, pixart, size):
    checkpoint = make_checkpoint(pack, pixart, gate="sigmoid")
    patched = apply(patch(pack, pixart, checkpoint), size, batch=2)
    assert largest_error(patched, apply(by_hand(make_pixart(), checkpoint), size, batch=2)) < 1e-5
    assert largest_error(patched, apply(pixart, size, batch=2)) > 1e-3


def test_area_and_unequal_conditioning(pack, unet, checkpoint):
    """Crops of several sizes and conditions of several lengths reach the sites in one sampling."""
    area = [[conditioning(1)[0][0], {"area": (9, 16, 3, 0), "strength": 1.0}], *conditioning(4, length=8)]
    options = {"positive": area, "negative": conditioning(2, length=3), "batch": 2}
    patched = sample(patch(pack, unet, checkpoint), (19, 16), **options)
    assert largest_error(patched, sample(by_hand(make_unet(), checkpoint), (19, 16), **options)) < 1e-5


@pytest.mark.parametrize("first", ["attention", "ΔConv"])
def test_clones_alternate_without_traces(pack, unet, checkpoint, first):
    models = {"attention": unet, "ΔConv": patch(pack, unet, checkpoint)}
    order = list(models) if first == "attention" else list(models)[::-1]
    runs = [{name: sample(models[name]) for name in order} for _ in range(3)]
    for name in order:
        assert all(torch.equal(run[name], runs[0][name]) for run in runs)
    alone = make_unet()
    assert torch.equal(sample(alone), runs[0]["attention"])


def test_only_the_clone_is_changed(pack, unet, checkpoint):
    before = state(unet)
    options, patches = copy.deepcopy(unet.model_options), dict(unet.object_patches)
    children = [name for name, _ in unet.model.named_modules()]
    clone = patch(pack, unet, checkpoint)
    sample(clone)
    assert unet.model_options == options and unet.object_patches == patches and not unet.wrappers
    assert [name for name, _ in unet.model.named_modules()] == children
    clone.detach()
    assert same_state(before, unet)
    attention = unet.model.diffusion_model.middle_block[1].transformer_blocks[0].attn1
    assert attention.forward == type(attention).forward.__get__(attention)


def test_a_selection_replaces_only_what_it_names(pack, unet, checkpoint):
    output = run_patch_node(pack, unet, checkpoint, blocks="all,-mid,-up_blocks.1")
    assert sorted(output.args[0].object_patches) == [
        f"diffusion_model.{block}.1.transformer_blocks.0.attn1.forward"
        for block in ("input_blocks.1", "input_blocks.3", "output_blocks.1")
    ]
    assert "3 of 5 self-attentions" in output.ui.as_dict()["text"][0]


def test_weights_are_loaded_once_and_counted(pack, unet, checkpoint):
    import comfy.model_management

    clone = patch(pack, unet, checkpoint)
    models = clone.clone().clone().model_patches_models()
    assert models == clone.model_patches_models()
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([clone])
    loaded = [m.model for m in comfy.model_management.current_loaded_models]
    assert clone in loaded and models[0] in loaded
    expected = sum(block.spec.num_parameters for block in checkpoint.blocks.values()) * 4
    assert models[0].model_size() == expected


def test_weights_are_shared_with_the_checkpoint_and_never_changed(pack, unet, checkpoint):
    before = {id: {k: v.clone() for k, v in b.state_dict().items()} for id, b in checkpoint.blocks.items()}
    clone = patch(pack, unet, checkpoint)
    sample(clone)
    net = clone.model_patches_models()[0].model
    theirs = next(iter(checkpoint.blocks.values())).conv_up.weight
    assert net.blocks[0].conv_up.weight.data_ptr() == theirs.data_ptr()
    assert not any(p.is_inference() or p.requires_grad for p in net.parameters())
    for id, block in checkpoint.blocks.items():
        assert all(torch.equal(v, before[id][k]) for k, v in block.state_dict().items())


def test_nothing_keeps_a_thrown_away_patch_alive(pack, unet, checkpoint):
    import comfy.model_management

    clone = patch(pack, unet, checkpoint)
    sample(clone)
    net = weakref.ref(clone.model_patches_models()[0].model)
    del clone
    sample(unet)
    comfy.model_management.cleanup_models_gc()
    gc.collect()
    comfy.model_management.unload_all_models()
    assert net() is None


@pytest.mark.parametrize(
    ("base", "manual_cast", "blocks"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float16, torch.float32, torch.float32),
        (torch.float8_e4m3fn, torch.bfloat16, torch.bfloat16),
    ],
    ids=["fp32", "bf16", "fp16 computing in fp32", "fp8 computing in bf16"],
)
def test_blocks_take_the_dtype_that_the_model_computes_in(pack, base, manual_cast, blocks):
    model = make_unet(base, manual_cast)
    before = state(model)
    checkpoint = make_checkpoint(pack, model)
    clone = patch(pack, model, checkpoint)
    assert {p.dtype for p in clone.model_patches_models()[0].model.parameters()} == {blocks}
    reference = sample(patch(pack, make_unet(), checkpoint))
    error = largest_error(sample(clone), reference)
    own = largest_error(sample(model), sample(make_unet()))
    assert error < max(1e-6, 2 * own)
    model.detach()
    assert same_state(before, model)


def test_patching_twice_replaces_the_first(pack, unet, checkpoint):
    other = make_checkpoint(pack, unet, kernel_size=5)
    once = patch(pack, unet, other)
    output = run_patch_node(pack, patch(pack, unet, checkpoint, start=0.2), other)
    twice = output.args[0]
    assert "before is replaced" in output.ui.as_dict()["text"][0]
    assert len(twice.model_patches_models()) == 1
    assert torch.equal(sample(twice), sample(once))
    fewer = patch(pack, twice, checkpoint, blocks="mid")
    assert len(fewer.object_patches) == 1
    assert torch.equal(sample(fewer), sample(patch(pack, unet, checkpoint, blocks="mid")))


def test_a_foreign_forward_patch_comes_back_when_the_selection_shrinks(pack, unet, checkpoint):
    def foreign(x, *args, **kwargs):
        return torch.zeros_like(x)

    path = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.forward"
    theirs = unet.clone()
    theirs.add_object_patch(path, foreign)
    output = run_patch_node(pack, theirs, checkpoint)
    assert "test_a_foreign_forward_patch_comes_back" in output.ui.as_dict()["text"][0]
    assert patch(pack, output.args[0], checkpoint, blocks="down").object_patches[path] is foreign


def test_text_is_told_once_in_the_log(pack, unet, checkpoint, caplog):
    with caplog.at_level("INFO"):
        output = run_patch_node(pack, unet, checkpoint)
    said = [r.getMessage() for r in caplog.records if "ΔConv" in r.getMessage()]
    assert said == list(output.ui.as_dict()["text"])


def wider(checkpoint, core):
    block = core.DeltaConvBlock(core.BlockSpec(64, 3))
    return {**checkpoint.blocks, "down_blocks.0.attentions.0.transformer_blocks.0.attn1": block}


def unknown(checkpoint, core):
    block = core.DeltaConvBlock(core.BlockSpec(64, 3))
    return {**checkpoint.blocks, "up_blocks.7.attentions.0.transformer_blocks.0.attn1": block}


def without_middle(checkpoint, core):
    return {id: block for id, block in checkpoint.blocks.items() if not id.startswith("mid")}


REFUSALS = {
    "architecture": (
        {"architecture": "sdxl"},
        {},
        r"for sdxl \(5 sites.*this MODEL is unet-32x2-64x3 \(5 sites: 2 of 32 channels, 3 of 64",
    ),
    "channels": ({"blocks": wider}, {}, r"channels differ at down_blocks.0\S* \(64, in the MODEL 32\)"),
    "extra site": ({"blocks": unknown}, {}, r"the MODEL has no up_blocks.7"),
    "missing site": ({"blocks": without_middle}, {}, r"4 of the 5 sites.*none for mid_block"),
    "unknown block": ({}, {"blocks": "up_blocks.9"}, r"'up_blocks.9' matches no site"),
    "nothing selected": ({}, {"blocks": "mid,-mid"}, r"selects nothing"),
    "unknown choice": ({}, {"base_weights": "maybe"}, r"must be 'apply' or 'leave out', got 'maybe'"),
    "empty range": ({}, {"start": 0.5, "end": 0.5}, r"start_percent=0.5, end_percent=0.5"),
    "backward range": ({}, {"start": 0.7, "end": 0.2}, r"start_percent=0.7, end_percent=0.2"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "options", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals_name_both_sides_and_change_nothing(pack, unet, checkpoint, changes, options, message):
    core = in_pack(pack, "deltaconv_core")
    expected = sample(patch(pack, unet, checkpoint))
    wrong = copy.copy(checkpoint)
    for name, value in changes.items():
        setattr(wrong, name, value(checkpoint, core) if callable(value) else value)
    with pytest.raises(core.DeltaConvError, match=message):
        run_patch_node(pack, unet, wrong, **options)
    assert torch.equal(sample(patch(pack, unet, checkpoint)), expected)


def test_partial_weights_serve_the_sites_that_they_have(pack, unet, checkpoint):
    partial = copy.copy(checkpoint)
    partial.blocks = without_middle(checkpoint, None)
    assert len(patch(pack, unet, partial, blocks="down,up").object_patches) == 4


def test_pixart_weights_on_a_unet(pack, unet):
    core = in_pack(pack, "deltaconv_core")
    with pytest.raises(core.DeltaConvError, match=r"for dit-48x2 \(2 sites.*this MODEL is unet-32x2-64x3"):
        run_patch_node(pack, unet, make_checkpoint(pack, make_pixart()))


def test_auto_without_recommended_weights(pack, unet):
    core = in_pack(pack, "deltaconv_core")
    with pytest.raises(core.DeltaConvError, match="recommended for unet-32x2-64x3"):
        run_patch_node(pack, unet, None)


@pytest.mark.parametrize("node", ["HyperTile", "TomePatchModel"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_changed_tokens_are_one_clear_error(pack, unet, checkpoint, node, order):
    core = in_pack(pack, "deltaconv_core")
    unpatched = sample(unet, (64, 64), steps=1)
    output = run_patch_node(pack, acted(unet, node) if order == "before" else unet, checkpoint)
    model = output.args[0] if order == "before" else acted(output.args[0], node)
    message = r"expected 64 x 64 = 4096 tokens.*HyperTile and Token Merging"
    with pytest.raises(core.DeltaConvError, match=message):
        sample(model, (64, 64), steps=1)
    assert ("changes the input" in output.ui.as_dict()["text"][0]) == (order == "before")
    assert torch.equal(sample(unet, (64, 64), steps=1), unpatched)
    assert sample(patch(pack, unet, checkpoint), (64, 64), steps=1).isfinite().all()


def acted(model, node):
    """The MODEL out of a node that changes the tokens before attention."""
    if node == "HyperTile":
        from comfy_extras.nodes_hypertile import HyperTile

        return called(HyperTile, "patch", model, 256, 2, 0, False)
    from comfy_extras.nodes_tomesd import TomePatchModel

    return called(TomePatchModel, "patch", model, 0.5)
