"""ΔConv in a part of the sampling."""

from __future__ import annotations

import pytest
import torch

from testing.comfy_models import (
    CONTEXT_DIM,
    conditioning,
    in_pack,
    make_checkpoint,
    patch,
    sample,
)
from testing.compare import largest_error

SIZES = {"unet": (16, 12), "pixart": (64, 48)}


@pytest.fixture(params=SIZES)
def case(request, pack):
    """(MODEL, blocks for it, latent size)"""
    model = request.getfixturevalue(request.param)
    return model, make_checkpoint(pack, model), SIZES[request.param]


def step(model, size, sigmas):
    """One call of the network at these noise levels, through the patches and wrappers of the MODEL."""
    import comfy.model_management
    import comfy.patcher_extension

    with torch.inference_mode():
        comfy.model_management.load_models_gpu([model])
        options = comfy.patcher_extension.copy_nested_dicts(model.model_options["transformer_options"])
        options["wrappers"] = comfy.patcher_extension.copy_nested_dicts(model.wrappers)
        options["sigmas"] = torch.tensor(sigmas)
        batch = len(sigmas)
        x = torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(0)) * 5
        context = torch.randn(1, 5, CONTEXT_DIM, generator=torch.Generator().manual_seed(1))
        context = context.repeat(batch, 1, 1)
        return model.model.apply_model(
            x, torch.tensor(sigmas), c_crossattn=context, transformer_options=options
        )


def sigma_at(model, percent):
    return model.get_model_object("model_sampling").percent_to_sigma(percent)


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.4), (0.4, 1.0), (0.3, 0.6)])
def test_attention_outside_is_the_models_own(pack, case, start, end):
    model, checkpoint, size = case
    whole, part = patch(pack, model, checkpoint), patch(pack, model, checkpoint, start=start, end=end)
    for percent in (0.05, 0.35, 0.45, 0.7, 0.95):
        sigmas = [sigma_at(model, percent)]
        expected = step(whole if start <= percent <= end else model, size, sigmas)
        assert torch.equal(step(part, size, sigmas), expected)
        assert not torch.equal(expected, step(model if start <= percent <= end else whole, size, sigmas))


def test_samples_of_one_batch_at_different_noise_levels(pack, unet, checkpoint):
    whole, part = patch(pack, unet, checkpoint), patch(pack, unet, checkpoint, end=0.5)
    sigmas = [sigma_at(unet, 0.2), sigma_at(unet, 0.8)]
    mixed = step(part, (16, 12), sigmas)
    assert largest_error(mixed[0], step(whole, (16, 12), sigmas)[0]) < 1e-5
    assert largest_error(mixed[1], step(unet, (16, 12), sigmas)[1]) < 1e-5


def test_range_follows_a_sampling_patch_put_on_later(pack, unet, checkpoint):
    """The noise level at a fraction of the sampling is asked for when the sampling runs."""
    from comfy_extras.nodes_model_advanced import ModelSamplingContinuousEDM

    part = patch(pack, unet, checkpoint, start=0.3)
    other = ModelSamplingContinuousEDM().patch(part, "eps", 400.0, 0.01)[0]
    whole = ModelSamplingContinuousEDM().patch(patch(pack, unet, checkpoint), "eps", 400.0, 0.01)[0]
    sigma = [10.0]
    assert sigma_at(part, 0.3) < 10 < sigma_at(other, 0.3)
    assert torch.equal(step(other, (16, 12), sigma), step(whole, (16, 12), sigma))


def test_an_error_in_a_call_leaves_nothing_behind(pack, unet, checkpoint):
    run = in_pack(pack, "nodes.host.patch.current_call")
    part = patch(pack, unet, checkpoint, end=0.5)
    inside, outside = [sigma_at(unet, 0.2)], [sigma_at(unet, 0.8)]
    expected = step(part, (16, 12), outside)

    def fail(*args):
        raise RuntimeError("stop here")

    broken = part.clone()
    broken.set_model_patch(fail, "middle_patch")
    with pytest.raises(RuntimeError, match="stop here"):
        step(broken, (16, 12), inside)
    assert not run._calls.get()
    assert torch.equal(step(part, (16, 12), outside), expected)


def test_calls_inside_calls_have_their_own_choice(pack, unet, checkpoint):
    """A patch that runs another patched MODEL in the middle of a step (as some guidance does)."""
    from testing.comfy_models import make_unet

    other = patch(pack, make_unet(), make_checkpoint(pack, unet, kernel_size=5), start=0.5)
    part = patch(pack, unet, checkpoint, end=0.5)
    sigmas = [sigma_at(unet, 0.2)]
    expected, expected_other = step(part, (16, 12), sigmas), step(other, (16, 12), sigmas)
    seen = []

    def nested(h, options):
        if options["block"] == ("input", 1):
            seen.append(step(other, (16, 12), sigmas))
        return h

    busy = part.clone()
    busy.set_model_input_block_patch(nested)
    assert torch.equal(step(busy, (16, 12), sigmas), expected)
    assert len(seen) == 1 and torch.equal(seen[0], expected_other)


def test_a_network_run_past_comfyuis_wrappers_is_refused(pack, unet, checkpoint):
    core = in_pack(pack, "deltaconv_core")
    part = patch(pack, unet, checkpoint, end=0.5)
    sample(part)
    with pytest.raises(core.DeltaConvError, match="start_percent to 0 and end_percent to 1"):
        part.model.diffusion_model(
            torch.zeros(1, 4, 8, 8),
            torch.ones(1),
            context=torch.zeros(1, 1, CONTEXT_DIM),
            transformer_options={},
        )


def test_a_whole_sampling_changes_sides_on_the_way(pack, case):
    model, checkpoint, size = case
    outputs = [
        sample(patch(pack, model, checkpoint, end=end) if end else model, size, steps=4)
        for end in (0.0, 0.3, 0.7, 1.0)
    ]
    for i, output in enumerate(outputs):
        assert not any(torch.equal(output, other) for other in outputs[i + 1 :])
    assert torch.equal(sample(model, size, steps=4), outputs[0])


def test_hooked_conditions_run_the_choice_once_more_without_harm(pack, unet, checkpoint):
    """Hooks make ComfyUI merge the wrappers again, so that ours may run twice for one call."""
    import comfy.hooks

    group = comfy.hooks.HookGroup()
    group.add(comfy.hooks.TransformerOptionsHook(transformers_dict={"someone": {"else": 1}}))
    hooked = [[conditioning(1)[0][0], {"hooks": group}]]
    part = patch(pack, unet, checkpoint, end=0.5)
    # They also keep the two conditions out of one batch, which changes the last bits.
    plain = sample(part, positive=conditioning(1))
    assert largest_error(sample(part, positive=hooked), plain) < 1e-4
