"""ΔConv with the rest of a user's graph.

Every case runs the same graph twice: on a MODEL out of ΔConv Patch Model, and on a network whose attentions
were replaced by hand. Both must agree, the model that went in must give the same pictures as before, and its
weights must be the same bits (the fixture `unet` checks that).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from testing.comfy_models import (
    by_hand,
    called,
    conditioning,
    make_checkpoint,
    make_hybrids,
    make_unet,
    patch,
    run_patch_node,
    sample,
    unet_config,
    wrapped_by_compile,
)
from testing.comfy_patches import (
    Model,
    attn2_patch,
    attn2_replace,
    compiled,
    deep_shrink,
    free_u,
    lora,
    merged,
    pag,
    rescale_cfg,
    sag,
    v_prediction,
)
from testing.compare import largest_error


def as_is(model: Model) -> Model:
    return model


@dataclass
class Case:
    """What is done to the MODEL before and after ΔConv, and how it is sampled."""

    before: Callable[[Model], Model] = as_is
    after: Callable[[Model], Model] = as_is
    run: Callable[[Model], torch.Tensor] = sample


# ---- ways to sample ----


def sampling(**options: Any) -> Callable[[Model], torch.Tensor]:
    return lambda model: sample(model, **options)


def controlled(model: Model) -> torch.Tensor:
    """With a ControlNet of the model's shape."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    config = unet_config(hint_channels=3)
    del config["out_channels"], config["transformer_depth_output"]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        network = comfy.cldm.cldm.ControlNet(**config, device="cpu", operations=comfy.ops.disable_weight_init)
        for parameter in network.parameters():
            parameter.data = torch.randn_like(parameter) * 0.05
    net = comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"))
    hint = torch.rand(1, 3, 128, 96, generator=torch.Generator().manual_seed(8))
    net = net.copy().set_cond_hint(hint, 0.9, (0.0, 1.0))
    positive = [[conditioning(1)[0][0], {"control": net, "control_apply_to_uncond": True}]]
    return sample(model, (16, 12), positive=positive)


def image_to_image(model: Model) -> torch.Tensor:
    latent = torch.randn(1, 4, 15, 12, generator=torch.Generator().manual_seed(4))
    return sample(model, latent=latent, denoise=0.5, steps=4)


def inpainting(model: Model) -> torch.Tensor:
    latent = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(4))
    mask = torch.zeros(1, 1, 16, 12)
    mask[..., 3:9, 2:10] = 1
    return sample(model, latent=latent, denoise=0.8, mask=mask)


def second_pass(model: Model) -> torch.Tensor:
    """Highres fix: the result, enlarged by half, is sampled again."""
    first = sample(model, (14, 10))
    larger = torch.nn.functional.interpolate(first, size=(21, 15), mode="bilinear")
    return sample(model, latent=larger, denoise=0.5, steps=4)


def areas_and_masks(model: Model) -> torch.Tensor:
    mask = torch.zeros(1, 18, 16)
    mask[:, 4:14] = 1
    positive = [
        [conditioning(1)[0][0], {"area": (9, 16, 0, 0), "strength": 0.8}],
        [conditioning(3, length=7)[0][0], {"area": (11, 5, 7, 11), "strength": 1.0}],
        [conditioning(4)[0][0], {"mask": mask, "mask_strength": 0.7, "set_area_to_bounds": True}],
    ]
    return sample(model, (18, 16), positive=positive)


CASES = {
    "LoRA before": Case(before=lora),
    "LoRA after": Case(after=lora),
    "attn2 patch before": Case(before=attn2_patch),
    "attn2 patch after": Case(after=attn2_patch),
    "attn2 replace before": Case(before=attn2_replace),
    "attn2 replace after": Case(after=attn2_replace),
    "FreeU before": Case(before=free_u),
    "FreeU after": Case(after=free_u),
    "deep shrink before": Case(before=deep_shrink, run=sampling(size=(22, 18))),
    "deep shrink after": Case(after=deep_shrink, run=sampling(size=(22, 18))),
    "PAG before": Case(before=pag),
    "PAG after": Case(after=pag),
    "SAG before": Case(before=sag),
    "SAG after": Case(after=sag),
    "RescaleCFG after": Case(after=rescale_cfg),
    "v prediction after": Case(after=v_prediction),
    "merged before": Case(before=merged),
    "merged after": Case(after=merged),
    "torch.compile": Case(after=compiled),
    "torch.compile, then another size": Case(
        after=compiled, run=lambda m: sample(m, (16, 16)).sum() + sample(m, (12, 18))
    ),
    "network wrapped before": Case(before=wrapped_by_compile),
    "network wrapped after": Case(after=wrapped_by_compile),
    "ControlNet": Case(run=controlled),
    "image to image": Case(run=image_to_image),
    "inpainting": Case(run=inpainting),
    "second pass at another size": Case(run=second_pass),
    "areas and masks": Case(run=areas_and_masks),
    "odd sizes": Case(run=sampling(size=(17, 23))),
    "a single row": Case(run=sampling(size=(1, 40))),
    "batch of three": Case(run=sampling(batch=3, size=(12, 10))),
    "without guidance": Case(run=sampling(cfg=1.0)),
    "second-order ancestral sampler": Case(run=sampling(sampler="dpmpp_2s_ancestral")),
    "much at once": Case(
        before=lora, after=lambda m: compiled(free_u(attn2_replace(merged(m)))), run=controlled
    ),
}


COMPILED = [name for name in CASES if "compile" in name]  # which takes most of a minute with hybrids
ROWS = [("ΔConv", name) for name in CASES] + [
    pytest.param("hybrid", name, marks=pytest.mark.slow if name in COMPILED else ()) for name in CASES
]


@pytest.mark.parametrize(("mixer", "name"), ROWS)
def test_agrees_with_blocks_put_in_by_hand(pack, unet, checkpoint, mixer, name):
    case = CASES[name]
    if mixer == "hybrid":
        checkpoint = make_hybrids(pack, unet, landmarks=9, nystrom="none", kernel_size=3, mean=True)
    untouched = case.run(case.after(case.before(unet)))
    patched = case.run(case.after(patch(pack, case.before(unet), checkpoint)))
    expected = case.run(case.after(case.before(by_hand(make_unet(), checkpoint))))
    assert largest_error(patched, expected) < 1e-5
    assert largest_error(patched, untouched) > 1e-4
    assert torch.equal(case.run(case.after(case.before(unet))), untouched)


def test_a_range_with_torch_compile(pack, unet, checkpoint):
    """The compiled network must not keep the choice of the first step."""
    part = patch(pack, unet, checkpoint, end=0.5)
    options = {"steps": 4, "size": (12, 10)}
    torch.testing.assert_close(sample(compiled(part), **options), sample(part, **options), rtol=0, atol=1e-3)
    assert largest_error(sample(part, **options), sample(patch(pack, unet, checkpoint), **options)) > 1e-4


def test_merging_takes_the_weights_and_leaves_the_blocks_behind(pack, unet, checkpoint):
    """A patched MODEL as the second input of a merge gives what the plain one gives."""
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    plain, patched = (
        sample(called(ModelMergeSimple, "merge", make_unet(), second, 0.5))
        for second in (unet, patch(pack, unet, checkpoint))
    )
    assert torch.equal(plain, patched)


def test_what_is_saved_is_the_base_model(pack, unet, checkpoint):
    """ModelSave and CheckpointSave write the base model without the blocks and under its own names."""
    names = list(unet.model_state_dict())
    clone = patch(pack, unet, checkpoint)
    sample(clone)
    assert list(clone.model_state_dict()) == list(unet.model_state_dict()) == names


def test_lora_keys_are_found_while_the_patched_clone_is_loaded(pack, unet, checkpoint):
    count = len(lora(unet).patches)
    sample(patch(pack, unet, checkpoint))
    assert len(lora(unet).patches) == count


def test_a_network_can_be_trained_on_top(pack, unet, checkpoint):
    """The blocks are made outside inference mode, so gradients pass through them."""
    import comfy.model_management

    clone = patch(pack, unet, checkpoint)
    with torch.inference_mode(False), torch.enable_grad():
        comfy.model_management.load_models_gpu([clone])
        x = torch.zeros(1, 4, 8, 8, requires_grad=True)
        context = conditioning(1)[0][0].clone()
        clone.model.apply_model(
            x, torch.ones(1), c_crossattn=context, transformer_options={}
        ).sum().backward()
        assert x.grad is not None and x.grad.abs().sum() > 0


# ---- what cannot work together is said ----

WARNINGS = {
    "LoRA": (lora, "a LoRA (or another weight patch) changes 15 weights of the self-attention at 5 sites"),
    "merge": (merged, "a LoRA (or another weight patch) changes"),
    "PAG": (pag, "PerturbedAttentionGuidance guides by self-attention"),
    "SAG": (sag, "SelfAttentionGuidance replaces the self-attention of 1 blocks"),
}


@pytest.mark.parametrize(("other", "said"), WARNINGS.values(), ids=WARNINGS)
def test_conflicts_before_are_said_by_the_node(pack, unet, checkpoint, caplog, other, said):
    output = run_patch_node(pack, other(unet), checkpoint)
    assert said in output.ui.as_dict()["text"][0] and said in caplog.text
    caplog.clear()
    sample(output.args[0])
    assert said not in caplog.text


@pytest.mark.parametrize(("other", "said"), WARNINGS.values(), ids=WARNINGS)
def test_conflicts_after_are_said_when_sampling(pack, unet, checkpoint, caplog, other, said):
    model = other(patch(pack, unet, checkpoint))
    assert said not in caplog.text
    sample(model)
    assert caplog.text.count(said) == 1


@pytest.mark.parametrize("case", [n for n in CASES if "attn2" in n or "FreeU" in n or "Rescale" in n])
def test_harmless_company_causes_no_warning(pack, unet, checkpoint, caplog, case):
    sample(CASES[case].after(patch(pack, CASES[case].before(unet), checkpoint)))
    assert "ΔConv:" not in caplog.text


def test_sites_left_to_attention_cause_no_warning(pack, unet, checkpoint, caplog):
    sample(patch(pack, sag(unet), checkpoint, blocks="-mid"))
    assert "SelfAttentionGuidance replaces" not in caplog.text


# ---- memory ----


@pytest.fixture
def little_memory(monkeypatch):
    """A device on which only a part of the weights fits, as far as ComfyUI can tell."""
    import comfy.model_management as management

    room = management.minimum_inference_memory() + 100_000
    monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(management, "vram_state", management.VRAMState.LOW_VRAM)
    monkeypatch.setattr(
        management,
        "get_free_memory",
        lambda dev=None, torch_free_too=False: (room, 0) if torch_free_too else room,
    )
    monkeypatch.setattr(management, "free_memory", lambda *args, **kwargs: [])


@pytest.mark.parametrize("before", [as_is, lora], ids=["plain", "LoRA"])
def test_partial_loading(pack, unet, checkpoint, before, little_memory, monkeypatch):
    clone = patch(pack, before(unet), checkpoint)
    partial = sample(clone)
    assert clone.model.model_lowvram
    blocks = clone.model_patches_models()[0]
    assert blocks.model.model_lowvram or blocks.loaded_size() == blocks.model_size()
    monkeypatch.undo()
    clone.detach()
    assert largest_error(partial, sample(patch(pack, before(unet), checkpoint))) < 1e-5


def test_unloading_under_pressure(pack, unet, checkpoint):
    """Both patchers are unloaded in part, in full and in any order between samplings."""
    import comfy.model_management as management

    clone = patch(pack, unet, checkpoint)
    blocks = clone.model_patches_models()[0]
    expected, plain = sample(clone), sample(unet)
    for unload in (
        lambda: clone.partially_unload(torch.device("cpu"), 200_000),
        lambda: blocks.partially_unload(torch.device("cpu"), 20_000),
        lambda: blocks.detach(),
        lambda: clone.detach(),
        management.unload_all_models,
        lambda: management.free_memory(1e30, torch.device("cpu")),
    ):
        sample(clone)
        unload()
        assert torch.equal(sample(clone), expected)
        unload()
        assert torch.equal(sample(unet), plain)


def test_memory_is_counted_as_base_and_blocks(pack, unet, checkpoint):
    import comfy.model_management as management

    management.unload_all_models()
    clone = patch(pack, unet, checkpoint)
    sample(clone)
    counted = sum(loaded.model_loaded_memory() for loaded in management.current_loaded_models)
    base = sum(p.numel() * p.element_size() for p in unet.model.state_dict().values())
    own = sum(p.numel() * 4 for block in checkpoint.blocks.values() for p in block.parameters())
    assert counted == base + own
    management.unload_all_models()
    assert clone.loaded_size() == 0 and clone.model_patches_models()[0].loaded_size() == 0


def test_two_checkpoints_in_one_prompt(pack, unet, checkpoint):
    """Two weights compared side by side are two clones of one base."""
    first, second = (patch(pack, unet, c) for c in (checkpoint, make_checkpoint(pack, unet, kernel_size=5)))
    alone = [sample(first), sample(second)]
    assert torch.equal(sample(first), alone[0]) and torch.equal(sample(second), alone[1])
    assert not torch.equal(*alone)
