"""Other packs' modules, forwards and guidance at the places where something of ours stands."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from testing.comfy_distill import distil
from testing.comfy_models import (
    CONTEXT_DIM,
    conditioning,
    in_pack,
    make_checkpoint,
    make_unet,
    patch,
    run_patch_node,
    sample,
    untouched,
)
from testing.compare import largest_error

SIZE = (16, 12)
BLOCK = "diffusion_model.middle_block.1.transformer_blocks.0"
ATTENTION = f"{BLOCK}.attn1"


# ---- modules that others put there ----


class Other(torch.nn.Module):
    """Stands in for a module of the network, with what is asked of its place."""

    def __init__(self, old):
        super().__init__()
        self.old = [old]
        if hasattr(old, "attn1"):
            self.attn1 = Other(old.attn1)

    def forward(self, *args, **kwargs):
        return 0.5 * self.old[0](*args, **kwargs)


class Through(torch.nn.Module):
    """Wraps a module and shows everything that is in it, as compiled modules do."""

    def __init__(self, old):
        super().__init__()
        self.old = old

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "old" else getattr(self.old, name)

    def forward(self, *args, **kwargs):
        return self.old(*args, **kwargs)


def swapped(model, place, kind=Other):
    clone = model.clone()
    clone.add_object_patch(place, kind(clone.get_model_object(place)))
    return clone


def ranged(pack, model, checkpoint):
    return patch(pack, model, checkpoint, start=0.3, end=0.7)


def windowed(pack, model, checkpoint):
    return in_pack(pack, "nodes.host.patch.neighborhood").add_neighborhood(model, 3, "all")[0]


def looked_at(pack, model, checkpoint):
    look = in_pack(pack, "nodes.host.locality.look")
    with torch.inference_mode():
        settings = look.LookSettings(2, 1, "all", 0)
        look.look(model, conditioning(1), {"samples": torch.zeros(1, 4, *SIZE)}, settings)
    return model


def measured(pack, model, checkpoint):
    measure = in_pack(pack, "nodes.host.bench.measure")
    with torch.inference_mode():
        measure.measure(model, checkpoint, measure.MeasureSettings(128, 96, 1, 1))
    return model


def converted(pack, model, checkpoint):
    conversion = in_pack(pack, "nodes.host.distill.conversion")
    job = conversion.ConversionJob(conversion.Wishes(pictures=4), 1, "all")
    with torch.inference_mode():
        conversion.convert(model, conditioning(1), None, {"samples": torch.zeros(1, 4, *SIZE)}, job, None)
    return model


def distilled(pack, model, checkpoint):
    return distil(pack, model).args[0]


OURS = {"whole": patch, "range": ranged, "window": windowed}
WORK = {"locality": looked_at, "benchmark": measured, "convert": converted, "distil": distilled}
PLACES = {
    ATTENTION: Other,
    BLOCK: Other,
    "diffusion_model.middle_block.1": copy.deepcopy,
    "diffusion_model.middle_block": copy.deepcopy,
    "diffusion_model": copy.deepcopy,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("ours", (OURS | WORK).values(), ids=OURS | WORK)
def test_another_module_there_before_is_refused(pack, unet, checkpoint, output, place, ours):
    """Before anything is changed, and before hours of training or minutes of sampling."""
    core = in_pack(pack, "deltaconv_core")
    theirs = swapped(unet, place, PLACES[place])
    with untouched(unet, SIZE):
        expected = sample(theirs, SIZE)
        with pytest.raises(core.DeltaConvError, match=rf"module of its own \(\w+\) at {place}, in"):
            sample(ours(pack, theirs, checkpoint), SIZE)
        assert torch.equal(sample(theirs, SIZE), expected)
        assert not output.exists()


def loaded_alone(model, size):
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])


@pytest.mark.parametrize("load", [sample, loaded_alone])
@pytest.mark.parametrize("ours", OURS.values(), ids=OURS)
def test_another_module_put_there_later_is_refused_before_it_is_loaded(pack, unet, checkpoint, ours, load):
    core = in_pack(pack, "deltaconv_core")
    with untouched(unet, SIZE):
        both = swapped(ours(pack, unet, checkpoint), ATTENTION).clone()
        unet.detach()
        with pytest.raises(core.DeltaConvError, match="module of its own"):
            load(both, SIZE)
        assert both.object_patches_backup == {}


def test_a_wrapper_that_shows_what_is_in_it_is_no_hindrance(pack, unet, checkpoint):
    with untouched(unet, SIZE):
        for model in (
            patch(pack, swapped(unet, BLOCK, Through), checkpoint),
            swapped(patch(pack, unet, checkpoint), BLOCK, Through),
        ):
            assert torch.equal(sample(model, SIZE), sample(patch(pack, unet, checkpoint), SIZE))
        unet.detach()


def test_sites_left_to_the_others_module_are_no_hindrance(pack, unet, checkpoint):
    with untouched(unet, SIZE):
        both = patch(pack, swapped(unet, ATTENTION), checkpoint, blocks="-mid")
        assert not torch.equal(sample(both, SIZE), sample(patch(pack, unet, checkpoint, blocks="-mid"), SIZE))
        unet.detach()


def test_a_loaded_clone_of_another_pack_hides_no_site(pack, unet):
    find_sites = in_pack(pack, "nodes.host.model.sites").find_sites
    theirs = swapped(unet, BLOCK)
    sample(theirs, SIZE)
    assert BLOCK in unet.object_patches_backup
    assert len(find_sites(unet).sites) == 5
    assert isinstance(unet.model.diffusion_model.middle_block[1].transformer_blocks[0], Other)


# ---- forwards that others put there ----


def zeros(x, *args, **kwargs):
    return torch.zeros_like(x)


def by_patch(model):
    clone = model.clone()
    clone.add_object_patch(f"{ATTENTION}.forward", zeros)
    return clone


def in_place(model):
    model.get_model_object(ATTENTION).forward = zeros
    return model


@pytest.mark.parametrize("theirs", [by_patch, in_place])
def test_outside_the_range_runs_what_stood_there(pack, checkpoint, caplog, theirs):
    model = theirs(make_unet())
    part = patch(pack, model, checkpoint, start=0.5)
    assert "zeros replaces self-attention where ΔConv stands" in caplog.text
    halves = [sample(m, SIZE, steps=4, denoise=1.0) for m in (part, model, patch(pack, model, checkpoint))]
    first = [first_step(m) for m in (part, model, patch(pack, model, checkpoint), make_unet())]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2]) and not torch.equal(first[0], first[3])
    assert not torch.equal(halves[0], halves[1]) and not torch.equal(halves[0], halves[2])
    model.detach()
    standing = make_unet() if theirs is by_patch else in_place(make_unet())
    assert torch.equal(
        sample(model if theirs is in_place else model.clone(), SIZE), sample(theirs(standing), SIZE)
    )


def first_step(model):
    """What a sampling of many steps has made after its first, which starts from pure noise."""
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning(1), conditioning(2))
    guider.set_cfg(3.0)
    sampling = model.get_model_object("model_sampling")
    sigmas = torch.tensor([float(sampling.sigma_max), float(sampling.percent_to_sigma(0.1))])
    noise = torch.randn(1, 4, *SIZE, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        return guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas)


def test_a_window_runs_outside_the_range_of_blocks_put_on_later(pack, unet, checkpoint):
    cut = windowed(pack, unet, checkpoint)
    assert torch.equal(first_step(patch(pack, cut, checkpoint, start=0.5)), first_step(cut))


@pytest.mark.parametrize("theirs", [by_patch, in_place])
def test_a_window_in_the_place_of_anothers_forward_is_said(pack, theirs):
    node = in_pack(pack, "nodes.neighborhood").NeighborhoodAttention
    text = node.execute(theirs(make_unet()), 3, "all").ui.as_dict()["text"][0]
    assert "zeros stood at 1 of these sites; neighborhood attention runs there in its place" in text


@pytest.mark.parametrize("theirs", [by_patch, in_place])
def test_the_benchmark_times_what_runs_in_the_model(pack, checkpoint, theirs):
    calls = []
    model = make_unet()
    forward = lambda x, *a, **k: (calls.append(1), torch.zeros_like(x))[1]  # noqa: E731
    if theirs is in_place:
        model.get_model_object(ATTENTION).forward = forward
    else:
        model.add_object_patch(f"{ATTENTION}.forward", forward)
    measured(pack, model, checkpoint)
    assert len(calls) == 2  # of attention: one pass to warm up and one that is timed


# ---- guidance ----


class AskewGuidance:
    """Runs the network once more with another self-attention; no list has its name."""

    def patch(self, model):
        import comfy.model_patcher
        import comfy.samplers

        def askew(q, k, v, options, mask=None):
            return v.flip(1)

        def guide(args):
            options = comfy.model_patcher.set_model_options_patch_replace(
                args["model_options"].copy(), askew, "attn1", "middle", 0
            )
            (other,) = comfy.samplers.calc_cond_batch(
                args["model"], [args["cond"]], args["input"], args["sigma"], options
            )
            return args["denoised"] + (args["cond_denoised"] - other) * 0.5

        clone = model.clone()
        clone.set_model_sampler_post_cfg_function(guide)
        return clone


class VeiledGuidance:
    """The same with an attn1 patch, by a helper in which alone it stands what it does."""

    def patch(self, model):
        clone = model.clone()
        clone.set_model_sampler_post_cfg_function(functools.partial(veiled_guide))
        return clone


def veiled_guide(args):
    return HELPERS["pass"](args)


def shuffled_pass(args):
    import comfy.samplers

    def shuffled(n, context, value, options):
        return n.flip(1), context, value

    options = args["model_options"].copy()
    options["transformer_options"] = options["transformer_options"].copy()
    patches = options["transformer_options"].get("patches", {})
    options["transformer_options"]["patches"] = {**patches, "attn1_patch": [shuffled]}
    (other,) = comfy.samplers.calc_cond_batch(
        args["model"], [args["cond"]], args["input"], args["sigma"], options
    )
    return args["denoised"] + (args["cond_denoised"] - other) * 0.5


HELPERS = {"pass": shuffled_pass}


def reordering(model):
    """As Token Perturbation Guidance: the blocks' forward puts the tokens in another order."""
    clone = model.clone()
    forward = clone.get_model_object(f"{BLOCK}.forward")
    clone.add_object_patch(f"{BLOCK}.forward", Reordered(forward))
    return clone


class Reordered:
    def __init__(self, forward):
        self.forward = forward

    def __call__(self, x, *args, **kwargs):
        return self.forward(x.flip(1), *args, **kwargs)


GUIDES = {
    "by its code": (lambda m: AskewGuidance().patch(m), "AskewGuidance guides by self-attention"),
    "by its blocks": (reordering, "Reordered changes what runs around the self-attention"),
}


@pytest.mark.parametrize(("guided", "said"), GUIDES.values(), ids=GUIDES)
def test_guidance_is_known_by_what_it_does(pack, unet, checkpoint, caplog, guided, said):
    output = run_patch_node(pack, guided(unet), checkpoint)
    assert said in output.ui.as_dict()["text"][0]
    caplog.clear()
    sample(output.args[0], SIZE)
    assert "ΔConv:" not in caplog.text
    later = guided(patch(pack, unet, checkpoint))
    for _ in range(2):
        sample(later.clone(), SIZE)
    assert caplog.text.count(said) == caplog.text.count("ΔConv:") == 1


def test_guidance_whose_code_does_not_show_it_is_said_in_its_first_pass(pack, unet, checkpoint, caplog):
    output = run_patch_node(pack, VeiledGuidance().patch(unet), checkpoint)
    assert "guides" not in output.ui.as_dict()["text"][0]
    for _ in range(2):
        sample(output.args[0], SIZE)
    assert caplog.text.count("shuffled_pass guides by self-attention") == caplog.text.count("ΔConv:") == 1


def test_guidance_without_self_attention_causes_no_warning(pack, unet, checkpoint, caplog):
    def guide(args):
        return args["denoised"] * 0.9

    clone = unet.clone()
    clone.set_model_sampler_post_cfg_function(guide)
    clone.set_model_sampler_cfg_function(lambda cond, uncond, scale: uncond + (cond - uncond) * scale)
    sample(patch(pack, clone, checkpoint), SIZE)
    assert "ΔConv:" not in caplog.text


# ---- clones ----


def renewed(model, change):
    """A clone that ComfyUI makes for another device, or without dynamic VRAM: it tells after the change."""
    clone = model.clone()
    change(clone)
    for callback in clone.get_all_callbacks("on_clone"):
        callback(model, clone)
    return clone


def test_a_clone_on_another_device_has_blocks_of_its_own(pack, unet, checkpoint):
    first = patch(pack, unet, checkpoint, end=0.5)
    expected = sample(first, SIZE)
    second = renewed(first, lambda clone: setattr(clone, "load_device", torch.device("cpu", 1)))
    ours, theirs = first.model_patches_models()[0], second.model_patches_models()[0]
    assert theirs is not ours and theirs.model is not ours.model
    assert theirs.load_device == torch.device("cpu", 1) and ours.load_device == unet.load_device
    assert not {id(p) for p in ours.model.parameters()} & {id(p) for p in theirs.model.parameters()}
    assert not any(p.is_inference() for p in theirs.model.parameters())
    for model, blocks in ((first, ours), (second, theirs)):
        stand = [f.block for key, f in model.object_patches.items() if key.endswith("attn1.forward")]
        assert {id(b) for b in stand} == {id(b) for b in blocks.model.blocks}
    again = renewed(first, lambda clone: setattr(clone, "load_device", torch.device("cpu", 1)))
    assert again.model_patches_models() == [theirs]
    assert second.clone().model_patches_models() == [theirs]
    assert torch.equal(sample(first, SIZE), expected)


def test_a_plain_clone_of_a_dynamic_model_has_plain_blocks(pack, unet, checkpoint, monkeypatch):
    """As TorchCompileModel makes it. What pages weights stands aside here: it needs a GPU."""
    import comfy.model_patcher

    class Dynamic(comfy.model_patcher.ModelPatcher):
        dynamic = True

        def is_dynamic(self):
            return self.dynamic

    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", Dynamic, raising=False)
    base = Dynamic(unet.model, unet.load_device, unet.offload_device)
    model = patch(pack, base, checkpoint)
    (blocks,) = model.model_patches_models()
    assert blocks.is_dynamic() and model.clone().model_patches_models() == [blocks]
    plain = renewed(model, lambda clone: setattr(clone, "dynamic", False))
    (own,) = plain.model_patches_models()
    assert own is not blocks and not getattr(own, "is_dynamic", lambda: False)()
    assert torch.equal(sample(plain, SIZE), sample(patch(pack, unet, checkpoint), SIZE))


def test_a_deep_clone_for_another_gpu(pack, unet, checkpoint):
    """Where ComfyUI has them (core's MultiGPU CFG Split)."""
    if not hasattr(unet, "deepclone_multigpu"):
        pytest.skip("this ComfyUI knows one GPU only")
    unet.cached_patcher_init = (lambda disable_dynamic=False: make_unet(), ())
    first = patch(pack, unet, checkpoint, end=0.5)
    expected = sample(first, SIZE)
    second = first.deepclone_multigpu(new_load_device=torch.device("cpu", 1))
    assert second.model is not first.model
    assert [m.load_device for m in second.model_patches_models()] == [torch.device("cpu", 1)]
    first.set_additional_models("multigpu", [second])
    first.match_multigpu_clones()
    (matched,) = first.get_additional_models_with_key("multigpu")
    assert matched.model_patches_models() == second.model_patches_models()
    assert largest_error(sample(second, SIZE), expected) < 1e-5


# ---- gradient checkpointing ----


def gradient(model, size, percents, module=None):
    """(losses, gradient of the latents) of two calls and one backward pass over both.

    Args:
        module: class of the layers that are recomputed; None keeps all activations.
    """
    import comfy.model_management
    import comfy.patcher_extension
    from torch.utils.checkpoint import checkpoint

    comfy.model_management.load_models_gpu([model])
    undo = []
    for layer in model.model.diffusion_model.modules() if module else ():
        if type(layer).__name__ == module:
            forward = layer.forward
            layer.forward = lambda *a, f=forward, **k: checkpoint(
                lambda a, k: f(*a, **k), a, k, use_reentrant=False
            )
            undo.append((layer, forward))
    try:
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(0)).requires_grad_()
            context = torch.randn(1, 5, CONTEXT_DIM, generator=torch.Generator().manual_seed(1))
            outputs = []
            for percent in percents:
                options = comfy.patcher_extension.copy_nested_dicts(
                    model.model_options["transformer_options"]
                )
                options["wrappers"] = comfy.patcher_extension.copy_nested_dicts(model.wrappers)
                sigma = torch.tensor([model.get_model_object("model_sampling").percent_to_sigma(percent)])
                outputs.append(
                    model.model.apply_model(x, sigma, c_crossattn=context, transformer_options=options)
                )
            sum(output.square().mean() for output in outputs).backward()
            return torch.stack([*(output.detach() for output in outputs), x.grad])
    finally:
        for layer, forward in undo:
            layer.forward = forward
        model.detach()


@pytest.mark.parametrize("ours", OURS.values(), ids=OURS)
@pytest.mark.parametrize(
    ("make", "size", "module"),
    [
        ("unet", (16, 12), "UNetModel"),
        ("unet", (16, 12), "SpatialTransformer"),
        ("unet", (16, 12), "BasicTransformerBlock"),
        ("pixart", (64, 48), "PixArtMS"),
        ("pixart", (64, 48), "PixArtMSBlock"),
    ],
)
def test_layers_run_again_in_the_backward_pass_as_they_ran_before(pack, request, make, size, module, ours):
    base = request.getfixturevalue(make)
    model = ours(pack, base, make_checkpoint(pack, base))
    percents = (0.5, 0.9, 0.1)
    expected = gradient(model, size, percents)
    torch.testing.assert_close(gradient(model, size, percents, module), expected)
    assert float(expected[-1].abs().max()) > 0


def test_train_lora_with_gradient_checkpointing(pack, unet, checkpoint):
    """ComfyUI's own node, with its default."""
    import inspect

    from comfy_extras.nodes_train import TrainLoraNode

    unet.cached_patcher_init = (lambda disable_dynamic=False: make_unet(), ())
    given = {
        "latents": [{"samples": torch.randn(1, 4, 16, 16)} for _ in range(2)],
        "positive": [conditioning(1) + conditioning(2)],
        "existing_lora": ["[None]"],
        "learning_rate": [1e-3],
        "optimizer": ["AdamW"],
        "loss_function": ["MSE"],
        "seed": [0],
        "training_dtype": ["fp32"],
        "lora_dtype": ["fp32"],
        "algorithm": ["LoRA"],
        "rank": [4],
    }
    flags = {"quantized_backward", "offloading", "bucket_mode", "bypass_mode"}
    named = inspect.signature(TrainLoraNode.execute).parameters
    for name in set(named) - {"model", "gradient_checkpointing", *given}:
        given[name] = [False] if name in flags else [1]

    def losses(model, checkpointing):
        with torch.inference_mode():
            out = TrainLoraNode.execute(model=[model], gradient_checkpointing=[checkpointing], **given)
        (found,) = [value["loss"] for value in out.args if isinstance(value, dict) and "loss" in value]
        return found

    for ours in OURS.values():
        model = ours(pack, unet, checkpoint)
        assert losses(model, True) == losses(model, False)
