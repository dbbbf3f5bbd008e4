"""ΔConv in a part of the sampling, decided by the model's timestep."""

from __future__ import annotations

import pytest
import torch

from deltaconv_core import DeltaConvError
from deltaconv_core.diffusers import apply
from testing.compare import largest_error
from testing.diffusers_models import call, make, make_checkpoint, make_pipeline, run, sample


def patched(case, **options):
    model = case.fresh()
    apply(model, case.checkpoint, **options)
    return model


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.4), (0.4, 1.0), (0.3, 0.6)])
def test_attention_outside_is_the_models_own(case, start, end):
    whole, part = patched(case), patched(case, start_percent=start, end_percent=end)
    for percent in (0.05, 0.35, 0.45, 0.7, 0.95):
        inside, timestep = start <= percent <= end, (1 - percent) * 999
        both = [run(model, timestep=timestep) for model in (whole, case.model)]
        assert torch.equal(run(part, timestep=timestep), both[not inside])
        assert not torch.equal(*both)


@pytest.mark.parametrize(
    ("percent", "timestep", "inside"),
    [
        ((0.5, 1.0), 499.5, True), ((0.5, 1.0), 499.6, False), ((0.5, 1.0), 0, True),
        ((0.0, 0.5), 499.5, True), ((0.0, 0.5), 499.4, False), ((0.0, 0.5), 999, True),
        ((0.0, 0.5), 1200.0, True), ((0.1, 1.0), 999, False),
    ],
)  # fmt: skip
def test_both_ends_belong_to_the_range(sd, percent, timestep, inside):
    whole, part = patched(sd), patched(sd, start_percent=percent[0], end_percent=percent[1])
    assert torch.equal(run(part, timestep=timestep), run(whole if inside else sd.model, timestep=timestep))


@pytest.mark.parametrize(
    "timestep", [700, 700.0, torch.tensor(700), torch.tensor([700.0]), torch.tensor([700, 700])]
)
@pytest.mark.parametrize("kind", ["sd", "pixart"])
def test_forms_of_a_timestep(kind, timestep):
    whole, part = make(kind), make(kind)
    checkpoint = make_checkpoint(whole)
    apply(whole, checkpoint)
    apply(part, checkpoint, end_percent=0.5)
    if kind == "pixart" and torch.as_tensor(timestep).numel() == 1:
        timestep = torch.as_tensor(timestep).expand(2)
    assert torch.equal(run(part, batch=2, timestep=timestep), run(whole, batch=2, timestep=timestep))


def test_samples_of_one_batch_at_different_noise_levels(case):
    whole, part = patched(case), patched(case, end_percent=0.5)
    timesteps = torch.tensor([800, 200])
    mixed = run(part, batch=2, timestep=timesteps)
    for i, model in enumerate((whole, case.model)):
        assert largest_error(mixed[i], run(model, batch=2, timestep=timesteps)[i]) < 1e-5


def test_arguments_by_position(sd):
    whole, part = patched(sd), patched(sd, end_percent=0.5)
    x, context = torch.ones(1, 4, 8, 6), torch.ones(1, 5, 16)
    for timestep, model in ((800, whole), (200, sd.model)):
        expected = call(model, x, context, timestep)
        assert torch.equal(part(x, timestep, context, None, None, None, {}).sample, expected)


def test_every_stack_without_a_site_stays_as_it_is(sd):
    only = {"blocks": "mid"}
    whole, part = patched(sd, **only), patched(sd, **only, end_percent=0.5)
    assert torch.equal(run(part, timestep=800), run(whole, timestep=800))
    assert torch.equal(run(part, timestep=200), run(sd.model, timestep=200))


def test_a_whole_sampling_changes_sides_on_the_way(sd, tmp_path):
    outputs = []
    for end in (0.0, 0.4, 0.8, 1.0):
        pipe = make_pipeline(tmp_path)
        if end:
            apply(pipe, sd.checkpoint, end_percent=end)
        outputs.append(sample(pipe))
    for i, output in enumerate(outputs):
        assert not any(torch.equal(output, other) for other in outputs[i + 1 :])


def test_timesteps_are_counted_as_the_scheduler_does(sd, tmp_path):
    """Halfway of 100 trained timesteps is 49.5; of the usual thousand it would be 499.5."""
    pipe = make_pipeline(tmp_path)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, num_train_timesteps=100)
    apply(pipe, sd.checkpoint, end_percent=0.5)
    whole = patched(sd)
    assert torch.equal(run(pipe.unet, timestep=50), run(whole, timestep=50))
    assert torch.equal(run(pipe.unet, timestep=49), run(sd.model, timestep=49))


def test_a_model_without_timestep_has_no_range(sd):
    class Odd(type(sd.model)):
        def forward(self, sample, time, encoder_hidden_states, cross_attention_kwargs=None):
            return super().forward(
                sample, time, encoder_hidden_states, cross_attention_kwargs=cross_attention_kwargs
            )

    sd.model.__class__ = Odd
    before = [dict(vars(module)) for module in sd.model.modules()]
    with pytest.raises(DeltaConvError, match="Odd takes no argument timestep.* takes sample, time"):
        apply(sd.model, sd.checkpoint, end_percent=0.5)
    assert [dict(vars(module)) for module in sd.model.modules()] == before
    apply(sd.model, sd.checkpoint)
    assert torch.equal(run(sd.model), run(patched(sd)))


def test_an_attention_called_past_the_model_is_refused(sd):
    apply(sd.model, sd.checkpoint, end_percent=0.5)
    with pytest.raises(DeltaConvError, match="past the model's own forward"):
        sd.model.mid_block.attentions[0](torch.ones(1, 32, 3, 3), torch.ones(1, 5, 16))
