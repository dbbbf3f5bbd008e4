"""Runs of ΔConv Distill: resuming, what cannot be resumed, folders, and runs that end early."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from testing.comfy_distill import distil, latents, weights
from testing.comfy_models import conditioning, in_pack, make_unet, sample
from testing.compare import same_weights

pytestmark = pytest.mark.usefixtures("output")


class Stop(Exception):
    pass


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_a_stopped_run_resumes_bit_by_bit(pack, unet, output, stop_after, step):
    """Over both stages, several sizes, accumulation and dropped captions."""
    job = {
        "data": latents((3, 4, 16, 16), (2, 4, 12, 20)),
        "positive": [conditioning(i, length=5 + 5 * (i % 2)) for i in range(5)],
        "negative": [conditioning(9)],
        "caption_dropout": 0.5,
        "layer_steps": 3,
        "output_steps": 3,
        "batch_size": 2,
        "accumulation": 2,
    }
    whole = distil(pack, unet, **job).args
    patching = stop_after(step)
    with pytest.raises(BaseException) as stopped:
        distil(pack, unet, run_name="stopped", **job)
    assert type(stopped.value).__name__ == "InterruptProcessingException"
    patching.undo()
    patching.setattr("folder_paths.output_directory", str(output.parent))
    resumed = distil(pack, unet, resume="stopped_00001", **job).args
    assert same_weights(weights(whole[1]), weights(resumed[1]))
    assert whole[1].metadata == resumed[1].metadata
    assert whole[2:] == resumed[2:]


def test_runs_that_cannot_be_reached_are_not_listed(pack, output):
    """The schema asks for the runs; an error there removes the node from ComfyUI."""
    runs = in_pack(pack, "nodes.host.distill.runs")
    (output / "a").mkdir(parents=True)
    (output / "a" / "state.safetensors").symlink_to("/mnt/unplugged/state.safetensors")
    (output / "b" / "state.safetensors").mkdir(parents=True)
    assert runs.choices() == [runs.NEW]
    in_pack(pack, "nodes.distill").Distill.GET_NODE_INFO_V1()


@pytest.mark.parametrize("name", ["x" * 300, "\ud800", "con", "a./b", "x.", "nul/x"])
def test_names_of_runs_that_some_system_refuses(pack, output, name):
    with pytest.raises(ValueError, match="expected a name such as"):
        in_pack(pack, "nodes.host.distill.runs").open_run("new run", name)
    assert not output.exists()


def dropping(pack, unet, **changes):
    """A run of four pictures a batch that drops half of the captions."""
    data, positive = latents((4, 4, 8, 8)), [conditioning(i) for i in range(4)]
    job = {"batch_size": 4, "caption_dropout": 0.5, "negative": [conditioning(9)], "output_steps": 4}
    return weights(distil(pack, unet, data, positive, **job | changes).args[1])


def test_a_run_of_before_drops_captions_as_it_did(pack, unet, output, stop_after, monkeypatch):
    """That of a whole batch or none; its notes do not say that they are dropped one by one."""
    module = in_pack(pack, "nodes.host.distill.session")
    new = dropping(pack, unet)
    with monkeypatch.context() as before:
        before.setattr(module, "DROPPED", {})
        by_batch = partial(module.Batches, by_batch=True)
        before.setattr(module, "Batches", lambda *given, **_: by_batch(*given))
        old = dropping(pack, unet, run_name="old")
        patching = stop_after(3)
        with pytest.raises(BaseException) as stopped:
            dropping(pack, unet, run_name="stopped")
    assert type(stopped.value).__name__ == "InterruptProcessingException"
    patching.undo()
    monkeypatch.setattr("folder_paths.output_directory", str(output.parent))
    assert not same_weights(old, new)
    assert same_weights(dropping(pack, unet, resume="stopped_00001"), old)
    folder = in_pack(pack, "deltaconv_core.distill").RunFolder
    saved = {name: folder(output / f"{name}_00001").values()["notes"] for name in ("test", "stopped")}
    assert saved["test"].pop("captions_dropped") == "one by one" and saved["test"] == saved["stopped"]


def test_a_finished_run_can_be_made_longer(pack, unet):
    distil(pack, unet, layer_steps=2, output_steps=0)
    longer = distil(pack, unet, layer_steps=2, output_steps=3, resume="test_00001").args
    assert longer[3] == 5 and len(longer[2]["loss"]) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 2e-3}, "learning_rate 0.001, now 0.002"),
        ({"training_seed": 1}, "seed 0, now 1"),
        ({"batch_size": 2}, "batch_size '1', now '2'"),
        ({"data": latents((2, 4, 16, 16), seed=1), "positive": [conditioning(1)]}, "data"),
        ({"kernel_sizes": "3"}, "blocks"),
        ({"resume": "../test_00001"}, "there is no run '../test_00001'"),
    ],
)
def test_what_cannot_go_on(pack, unet, changes, message):
    distil(pack, unet)
    with pytest.raises(ValueError, match=message):
        distil(pack, unet, **{"resume": "test_00001"} | changes)


def test_another_teacher_cannot_go_on(pack, unet):
    distil(pack, unet)
    other = make_unet()
    next(other.model.diffusion_model.parameters()).data += 0.01
    with pytest.raises(ValueError, match="teacher"):
        distil(pack, other, resume="test_00001")


def with_lora(model, seed):
    import comfy.lora

    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_v.weight"
    up, down = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(seed))
    loaded = comfy.lora.load_lora({"a.lora_up.weight": up, "a.lora_down.weight": down.T}, {"a": key})
    clone = model.clone()
    assert clone.add_patches(loaded, 0.5) == [key]
    return clone


def predicting_v(model):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    return ModelSamplingDiscrete().patch(with_lora(model, 0), "v_prediction", False)[0]


@pytest.mark.parametrize(
    "change", [lambda model: model, lambda model: with_lora(model, 1), predicting_v], ids=["no", "lora", "v"]
)
def test_another_lora_or_prediction_cannot_go_on(pack, unet, change):
    """With the same strength, at the same place."""
    distil(pack, with_lora(unet, 0))
    distil(pack, with_lora(unet, 0), resume="test_00001")
    with pytest.raises(ValueError, match="teacher"):
        distil(pack, change(unet), resume="test_00001")


def test_runs_never_overwrite_each_other(pack, unet, output):
    for _ in range(2):
        distil(pack, unet)
    assert sorted(path.name for path in output.iterdir()) == ["test_00001", "test_00002"]
    choices = in_pack(pack, "nodes.host.distill.runs").choices
    assert choices() == ["new run", "test_00002", "test_00001"]
    distil(pack, unet, resume="test_00001", output_steps=3)
    assert choices() == ["new run", "test_00001", "test_00002"]


@pytest.mark.parametrize("name", ["", "../out", "/tmp/out", "a//b", ".hidden", "a\\b", "con:", "a\nb"])
def test_bad_run_names(pack, unet, output, name):
    with pytest.raises(ValueError, match="expected a name"):
        distil(pack, unet, run_name=name)
    assert not output.exists()


def test_a_run_that_never_began_leaves_nothing(pack, unet, output, monkeypatch):
    def stop(*args, **options):
        raise Stop

    monkeypatch.setattr(in_pack(pack, "nodes.host.distill.session"), "distill", stop)
    with pytest.raises(Stop):
        distil(pack, unet)
    assert list(output.iterdir()) == []


def test_a_run_that_diverges_keeps_the_last_good_weights(pack, unet, monkeypatch):
    """The third batch is poisoned."""
    batches = in_pack(pack, "nodes.host.distill.session").Batches
    call = batches.__call__

    def poisoned(self, number):
        batch = call(self, number)
        batch.noisy.mul_(torch.nan if number == 2 else 1)
        return batch

    monkeypatch.setattr(batches, "__call__", poisoned)
    output = distil(pack, unet, layer_steps=5)
    assert output.args[3] == 2
    text = output.ui.as_dict()["text"][0]
    assert "2 of 7 steps" in text and "training ended early: step 3 (layer-wise)" in text
    assert sample(output.args[0]).isfinite().all()


def test_a_finished_run_is_taken_from_its_folder(pack, unet, output, monkeypatch):
    """As when ComfyUI has dropped the result from its cache; with other settings it is another run."""
    first = distil(pack, unet, run_name="mine")
    progress = in_pack(pack, "nodes.host.distill.session")._Progress
    with monkeypatch.context() as untrained:
        untrained.setattr(progress, "__call__", lambda self, row: pytest.fail("trained again"))
        again = distil(pack, unet, run_name="mine")
    assert "mine_00001 was finished with the same" in again.ui.as_dict()["text"][0]
    assert same_weights(weights(first.args[1]), weights(again.args[1]))
    assert first.args[2:] == again.args[2:]
    states = [(folder / "state.safetensors").read_bytes() for folder in sorted(output.iterdir())]
    assert len(states) == 2 and states[0] == states[1]
    other = distil(pack, unet, run_name="mine", training_seed=5)
    assert not same_weights(weights(first.args[1]), weights(other.args[1]))
