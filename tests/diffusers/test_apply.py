"""ΔConv on models of diffusers: the right answer, no trace after `remove`, refusals that name both sides."""

from __future__ import annotations

import copy
import logging
import pickle
import threading

import pytest
import torch

from deltaconv_core import Checkpoint, DeltaConvError, save_checkpoint
from deltaconv_core.diffusers import apply, remove
from testing.compare import ROUNDING, largest_error, same_weights
from testing.diffusers_models import (
    by_hand,
    call,
    make,
    make_checkpoint,
    make_pipeline,
    make_pixart_pipeline,
    run,
    sample,
)


def state(model):
    """Everything about a model that `remove` has to bring back; objects by identity."""
    modules = {name: vars(module) for name, module in model.named_modules()}
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "parameters": {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()},
        "modules": {name: sorted(parts) for name, parts in modules.items()},
        "forwards": {name: parts["forward"] for name, parts in modules.items() if "forward" in parts},
        "hooks": {
            name: [
                dict(value) for key, value in sorted(parts.items()) if "hooks" in key and value is not None
            ]
            for name, parts in modules.items()
        },
    }


def assert_same(before, after):
    for name, value in before.pop("weights").items():
        assert torch.equal(value, after["weights"].pop(name))
    assert after.pop("weights") == {}
    assert before == after


@pytest.mark.parametrize("size", [(16, 16), (10, 26), (18, 14)])
@pytest.mark.parametrize("batch", [1, 3])
def test_output_is_that_of_blocks_put_in_by_hand(case, size, batch):
    plain = run(case.model, size, batch)
    apply(case.model, case.checkpoint)
    patched = run(case.model, size, batch)
    assert largest_error(patched, run(by_hand(case.fresh(), case.checkpoint, size), size, batch)) < 1e-5
    assert largest_error(patched, plain) > 0.01


@pytest.mark.parametrize("size", [(9, 31), (17, 23), (1, 5)])
@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_odd_sizes(kind, size):
    model, checkpoint = make(kind), make_checkpoint(make(kind))
    apply(model, checkpoint)
    assert largest_error(run(model, size), run(by_hand(make(kind), checkpoint, size), size)) < 1e-5


def test_one_model_at_many_sizes(case):
    apply(case.model, case.checkpoint)
    for size in [(16, 12), (12, 16), (8, 24), (16, 12)]:
        assert (
            largest_error(run(case.model, size), run(by_hand(case.fresh(), case.checkpoint, size), size))
            < 1e-5
        )


def test_remove_brings_everything_back(case):
    plain, before = run(case.model), state(case.model)
    apply(case.model, case.checkpoint, start_percent=0.2)
    run(case.model)
    apply(case.model, case.checkpoint)
    assert not torch.equal(run(case.model), plain)
    remove(case.model)
    assert_same(before, state(case.model))
    assert torch.equal(run(case.model), plain)


def test_the_blocks_are_none_of_the_models_weights(case, tmp_path):
    before, modules = case.model.state_dict().keys(), len(list(case.model.modules()))
    parameters = [id(parameter) for parameter in case.model.parameters()]
    apply(case.model, case.checkpoint)
    assert case.model.state_dict().keys() == before
    assert [id(parameter) for parameter in case.model.parameters()] == parameters
    assert len(list(case.model.modules())) == modules + 1
    case.model.save_pretrained(tmp_path)
    again = type(case.model).from_pretrained(tmp_path)
    plain = case.fresh()
    assert same_weights(again.state_dict(), plain.state_dict())
    assert largest_error(run(again), run(plain)) < ROUNDING < largest_error(run(case.model), run(plain))
    assert f"{len(case.checkpoint.blocks)} blocks" in repr(case.model)


def test_the_checkpoints_blocks_stay_as_they_are(sd):
    before = copy.deepcopy(sd.checkpoint.blocks)
    apply(sd.model, sd.checkpoint)
    sd.model.to(torch.bfloat16)
    for site, block in sd.checkpoint.blocks.items():
        for name, value in block.state_dict().items():
            assert value.dtype == torch.float32 and torch.equal(value, before[site].state_dict()[name])


@pytest.mark.parametrize(
    ("blocks", "count", "changed"),
    [
        ("all", 7, None),
        ("mid", 1, ["mid_block.attentions.0.transformer_blocks.0.attn1"]),
        ("up,-up_blocks.2", 2, ["up_blocks.1.attentions.0.transformer_blocks.0.attn1"]),
    ],
)
def test_a_selection_replaces_only_what_it_names(sd, blocks, count, changed):
    report = apply(sd.model, sd.checkpoint, blocks=blocks)
    assert f"stands in for {count} of 7 self-attentions of unet-16x3-32x4" in report.text
    there = [name for name, m in sd.model.named_modules() if "forward" in vars(m)]
    assert len(there) == count and set(changed or there) <= set(there)
    part = Checkpoint(sd.checkpoint.architecture, {site: sd.checkpoint.blocks[site] for site in there})
    assert largest_error(run(sd.model), run(by_hand(sd.fresh(), part, (16, 12)))) < 1e-5


def test_nobody_warns_of_what_is_handed_down(case, caplog):
    diffusers_log = logging.getLogger("diffusers")
    diffusers_log.addHandler(caplog.handler)
    try:
        some = {"blocks": "-*.1" if case.kind == "pixart" else "mid"}
        for options in ({}, some, {"end_percent": 0.3}, some | {"end_percent": 0.3}):
            apply(case.model, case.checkpoint, **options)
            for timestep in (10, 900):
                run(case.model, timestep=timestep)
    finally:
        diffusers_log.removeHandler(caplog.handler)
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_other_arguments_still_arrive(sd):
    """What a user passes on to attention processors reaches those that run."""
    apply(sd.model, sd.checkpoint)
    seen = []

    class Listening(type(sd.model.mid_block.attentions[0].transformer_blocks[0].attn2.processor)):
        def __call__(self, *args, loudness, **kwargs):
            seen.append((loudness, sorted(kwargs)))
            return super().__call__(*args, **kwargs)

    for name, module in sd.model.named_modules():
        if name.endswith("attn2"):
            module.set_processor(Listening())
    theirs = {"loudness": 11}
    call(sd.model, torch.ones(1, 4, 8, 8), torch.ones(1, 5, 16), 5, cross_attention_kwargs=theirs)
    assert seen == [(11, ["attention_mask", "encoder_hidden_states"])] * 7 and theirs == {"loudness": 11}


def test_applying_again_replaces(sd, caplog):
    other = make_checkpoint(sd.model, gate="sigmoid")
    before = state(sd.model)
    apply(sd.model, sd.checkpoint, end_percent=0.5)
    report = apply(sd.model, other)
    assert "is replaced as a whole" in report.text
    assert largest_error(run(sd.model), run(by_hand(sd.fresh(), other, (16, 12)))) < 1e-5
    remove(sd.model)
    assert_same(before, state(sd.model))


def test_removing_nothing_is_said(sd, caplog):
    before = state(sd.model)
    remove(sd.model)
    assert "there is none on this model (UNet2DConditionModel)" in caplog.text
    assert_same(before, state(sd.model))


def test_what_was_done_is_logged_once(sd, caplog):
    with caplog.at_level(logging.INFO, logger="deltaconv_core"):
        report = apply(sd.model, sd.checkpoint, start_percent=0.25)
        run(sd.model)
    assert [record.message for record in caplog.records] == [" ".join(report.lines)]
    assert "(0.0118 M parameters, float32)" in report.text and "runs from 25.0% to 100.0%" in report.text


def without_site(checkpoint):
    checkpoint.blocks.popitem()


def with_another(checkpoint):
    checkpoint.blocks["up_blocks.9.attentions.0.transformer_blocks.0.attn1"] = next(
        iter(checkpoint.blocks.values())
    )


def of_another_kind(checkpoint):
    checkpoint.architecture = "sdxl"


def of_another_model(checkpoint):
    checkpoint.__dict__.update(make_checkpoint(make("xl")).__dict__)


@pytest.mark.parametrize("first", [False, True], ids=["bare model", "ΔConv there"])
@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (
            of_another_kind,
            {},
            r"for sdxl \(7 sites.*this model is unet-16x3-32x4 \(7 sites: 3 of 16 channels",
        ),
        (of_another_model, {}, r"for unet-32x8 .* this model is unet-16x3-32x4.*the model has no .*blocks.1"),
        (with_another, {}, "the model has no up_blocks.9"),
        (
            without_site,
            {},
            "blocks for 6 of the 7 sites.*none for up_blocks.2.attentions.1.*leave those sites out",
        ),
        (None, {"blocks": "nowhere"}, "'nowhere' matches no site"),
        (None, {"start_percent": 0.8, "end_percent": 0.2}, "start_percent=0.8, end_percent=0.2"),
        (None, {"base_weights_strength": 1.5}, "expected 0 <= base_weights_strength <= 1, got 1.5"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(sd, spoil, options, message, first):
    if first:
        apply(sd.model, sd.checkpoint, start_percent=0.3)
    before = state(sd.model)
    if spoil:
        spoil(sd.checkpoint)
    with pytest.raises(DeltaConvError, match=message):
        apply(sd.model, sd.checkpoint, **options)
    assert_same(before, state(sd.model))


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (torch.nn.Linear(2, 2), r"this model \(Linear\) has no self-attention.*PixArtTransformer2DModel"),
        ("model", "expected a diffusers model, or a pipeline with unet or transformer; got str"),
    ],
)
def test_what_is_no_diffusion_model(sd, thing, message):
    with pytest.raises(DeltaConvError, match=message):
        apply(thing, sd.checkpoint)


def test_from_a_file(sd, tmp_path):
    save_checkpoint(sd.checkpoint, tmp_path / "weights.safetensors")
    apply(sd.model, sd.checkpoint)
    expected = run(sd.model)
    for path in (tmp_path / "weights.safetensors", str(tmp_path / "weights.safetensors")):
        apply(sd.model, path)
        assert largest_error(run(sd.model), expected) < ROUNDING


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ["cast first", "apply first"])
def test_smaller_dtypes(case, dtype, order):
    steps = [lambda: case.model.to(dtype), lambda: apply(case.model, case.checkpoint)]
    for step in steps if order == "cast first" else steps[::-1]:
        step()
    stored = {weight.dtype for block in case.model.deltaconv.blocks.values() for weight in block.parameters()}
    assert stored == {dtype}
    patched = run(case.model, (8, 6))
    assert patched.dtype == dtype
    assert largest_error(patched.float(), run(by_hand(case.fresh(), case.checkpoint, (8, 6)), (8, 6))) < 0.06
    remove(case.model)
    assert torch.equal(run(case.model, (8, 6)), run(case.fresh().to(dtype), (8, 6)))


def test_channels_last(sd):
    apply(sd.model, sd.checkpoint)
    expected = run(sd.model)
    sd.model.to(memory_format=torch.channels_last)
    assert largest_error(run(sd.model), expected) < 1e-5


def test_a_copy_of_a_patched_model_is_on_its_own(case):
    apply(case.model, case.checkpoint, end_percent=0.6)
    expected = [run(case.model, timestep=t) for t in (800, 100)]
    for other in (copy.deepcopy(case.model), pickle.loads(pickle.dumps(case.model))):
        remove(case.model)
        outputs = [run(other, timestep=t) for t in (800, 100)]
        assert all(largest_error(y, e) < ROUNDING for y, e in zip(outputs, expected, strict=True))
        remove(other)
        plain = case.fresh()
        assert same_weights(other.state_dict(), plain.state_dict())
        attention = run(plain, timestep=800)
        assert largest_error(run(other, timestep=800), attention) < ROUNDING
        assert largest_error(expected[0], attention) > 0.01
        apply(case.model, case.checkpoint, end_percent=0.6)


def test_attention_that_only_looks_at_the_text_is_no_site():
    config = {name: value for name, value in make("sd").config.items() if not name.startswith("_")}
    config["only_cross_attention"] = (True, False, False)
    models = [type(make("sd"))(**config).eval() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    checkpoint = make_checkpoint(models[0])
    assert checkpoint.architecture == "unet-32x4"
    assert "4 of 4" in apply(models[0], checkpoint).text
    assert largest_error(run(models[0]), run(by_hand(models[1], checkpoint, (16, 12)))) < 1e-5


def test_threads_with_different_sizes_share_a_model(sd):
    """The same number of tokens, laid out otherwise."""
    apply(sd.model, sd.checkpoint)
    sizes = [(8, 24), (24, 8), (16, 12), (12, 16)]
    expected = {size: run(sd.model, size) for size in sizes}
    wrong = []

    def work(size):
        wrong.extend(size for _ in range(8) if not torch.equal(run(sd.model, size), expected[size]))

    threads = [threading.Thread(target=work, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_gradients_with_and_without_checkpointing(case):
    """Backward of an earlier call after a later one of another shape recomputes at the earlier one's grid."""
    apply(case.model, case.checkpoint)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            case.model.enable_gradient_checkpointing()
        case.model.train(checkpointing)
        x = torch.randn(1, 4, 8, 24, generator=torch.Generator().manual_seed(0), requires_grad=True)
        output = call(case.model, x, torch.ones(1, 5, 16), 500)
        call(case.model, x.detach().mT, torch.ones(1, 5, 16), 500)
        output.square().sum().backward()
        gradients.append(x.grad)
    assert largest_error(*gradients) < 1e-4


def test_a_forward_that_was_there_before(sd):
    """Another patch on an attention: ΔConv stands on top of it, and it is what runs outside the range."""
    attention = sd.model.mid_block.attentions[0].transformer_blocks[0].attn1
    own, calls = attention.forward, []

    def theirs(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    attention.forward = theirs
    apply(sd.model, sd.checkpoint, end_percent=0.5)
    run(sd.model, timestep=900)
    assert calls == []
    run(sd.model, timestep=100)
    assert calls == [1]
    remove(sd.model)
    assert attention.forward is theirs


def test_a_forward_that_was_put_on_top(sd):
    apply(sd.model, sd.checkpoint)
    attention = sd.model.mid_block.attentions[0].transformer_blocks[0].attn1
    ours = attention.forward
    attention.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    before = state(sd.model)
    for action in (lambda: remove(sd.model), lambda: apply(sd.model, sd.checkpoint)):
        with pytest.raises(DeltaConvError, match="something else .*lambda.* on top of ΔConv at mid_block"):
            action()
    assert_same(before, state(sd.model))


def test_calls_that_ask_for_more_than_the_pictures_own_tokens(sd):
    apply(sd.model, sd.checkpoint)
    attention = sd.model.mid_block.attentions[0].transformer_blocks[0].attn1
    x = torch.ones(1, 4, 32)
    for options, message in [
        ({"encoder_hidden_states": x}, "tokens other than the picture's own"),
        ({"attention_mask": torch.zeros(1, 1, 4)}, "called with a mask"),
        ({}, "past the model's own forward"),
    ]:
        with pytest.raises(DeltaConvError, match=f"mid_block.*{message}"):
            attention(x, **options)


def test_merged_tokens_are_refused_by_name(sd):
    apply(sd.model, sd.checkpoint)
    block = sd.model.mid_block.attentions[0].transformer_blocks[0]
    block.norm1.register_forward_hook(lambda module, args, output: output[:, :-1])
    with pytest.raises(DeltaConvError, match="ToMe"):
        run(sd.model)


def test_a_pipeline(sd, tmp_path):
    pipe = make_pipeline(tmp_path)
    plain = sample(pipe)
    apply(pipe, sd.checkpoint)
    patched = sample(pipe)
    expected = sample(make_pipeline(tmp_path, unet=by_hand(make("sd"), sd.checkpoint, (12, 16))))
    assert largest_error(patched, expected) < 1e-5 and largest_error(patched, plain) > 0.01
    remove(pipe)
    assert torch.equal(sample(pipe), plain)


def test_a_pixart_pipeline(pixart, tmp_path):
    options = {"use_resolution_binning": False, "negative_prompt": ""}
    pipe = make_pixart_pipeline(tmp_path)
    plain = sample(pipe, **options)
    apply(pipe, pixart.checkpoint)
    patched = sample(pipe, **options)
    other = make_pixart_pipeline(tmp_path)
    by_hand(other.transformer, pixart.checkpoint, (12, 16))
    assert largest_error(patched, sample(other, **options)) < 1e-5 < largest_error(patched, plain)
    remove(pipe)
    assert torch.equal(sample(pipe, **options), plain)
