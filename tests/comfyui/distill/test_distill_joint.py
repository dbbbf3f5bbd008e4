"""ΔConv Distill on MODELs of text and image together: the joint mixers that are on them learn."""

from __future__ import annotations

import pytest
import torch

from testing.comfy_distill import distil, latents, weights
from testing.comfy_joint_models import joint_conditioning, make_joint, make_joint_mixers, with_joint
from testing.comfy_models import in_pack, same_state, state
from testing.compare import same_weights

pytestmark = pytest.mark.usefixtures("output")

MIXED = {"landmarks": 6, "kernel_size": 3}
FAMILIES = ["flux_reference", "flux2", "chroma", "sd35", "lumina2", "z_image", "qwen_image"]
JOB = {"layer_steps": 6, "output_steps": 0, "learning_rate": 0.03, "ema": 0.0}


def started(pack, name, sites=None, spec=MIXED):
    """The MODEL as it is, and with joint mixers."""
    model = make_joint(name)
    return model, with_joint(pack, model, make_joint_mixers(pack, model, sites, **spec))


def learn(pack, patched, name, **changes):
    """The node's NodeOutput: three pictures of two sizes."""
    channels = 128 if name.startswith("flux2") else 16
    data = latents((2, channels, 12, 16), (1, channels, 9, 14))
    return distil(pack, patched, data, [joint_conditioning(name)], **JOB | changes)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_mixer_learns_and_the_model_stays_as_it_was(pack, name):
    """The same picture under the same noise at each step, so that the loss has to fall."""
    if name == "z_image":
        pytest.importorskip("comfy.text_encoders.z_image", reason="this ComfyUI is older than Z-Image")
    model, patched = started(pack, name)
    before, start = (
        state(model),
        weights(in_pack(pack, "nodes.host.patch.applied").blocks_on(patched).checkpoint),
    )
    output = learn(pack, patched, name, layer_steps=25)
    trained, checkpoint, losses, steps = output.args
    assert steps == 25
    early, late = sum(losses["loss"][:5]), sum(losses["loss"][-5:])
    assert late < 0.9 * early
    learned = weights(checkpoint)
    assert learned.keys() == start.keys()
    assert all(not torch.equal(learned[key], start[key]) for key in start)
    patch = in_pack(pack, "nodes.host.patch.applied").blocks_on(trained)
    assert same_weights(weights(patch.checkpoint), learned)
    assert same_state(before, model)


@pytest.mark.parametrize("step", [1, 3])
def test_a_stopped_run_resumes_bit_by_bit(pack, output, stop_after, step):
    _, patched = started(pack, "flux")
    whole = learn(pack, patched, "flux").args
    patching = stop_after(step)
    with pytest.raises(BaseException) as stopped:
        learn(pack, patched, "flux", run_name="stopped")
    assert type(stopped.value).__name__ == "InterruptProcessingException"
    patching.undo()
    patching.setattr("folder_paths.output_directory", str(output.parent))
    resumed = learn(pack, patched, "flux", resume="stopped_00001").args
    assert same_weights(weights(whole[1]), weights(resumed[1]))
    assert whole[1].metadata == resumed[1].metadata and whole[2:] == resumed[2:]


def test_a_cancel_before_the_first_step_leaves_nothing(pack, output, monkeypatch):
    model, patched = started(pack, "flux")
    before = state(model)
    network = in_pack(pack, "nodes.host.distill.joint_learning").JointNetwork
    interrupted = in_pack(pack, "nodes.host.distill.session").comfy.model_management

    def cancelled(*_):
        raise interrupted.InterruptProcessingException

    monkeypatch.setattr(network, "clean", cancelled)
    with pytest.raises(BaseException) as stopped:
        learn(pack, patched, "flux")
    assert type(stopped.value).__name__ == "InterruptProcessingException"
    assert not list(output.iterdir())
    assert same_state(before, model)
    assert not any("forward" in vars(module) for module in model.model.modules())


def test_an_empty_caption_may_be_shorter_than_those_of_its_batch(pack):
    _, patched = started(pack, "qwen_image")
    ((text, more),) = joint_conditioning("qwen_image")
    data, negative = latents((4, 16, 12, 16)), [[[text[:, :2], more]]]
    job = JOB | {"batch_size": 2, "negative": negative, "caption_dropout": 0.5}
    assert distil(pack, patched, data, [joint_conditioning("qwen_image")], **job).args[3] == 6


def test_only_chosen_mixers_learn(pack):
    _, patched = started(pack, "flux")
    mixers = in_pack(pack, "nodes.host.patch.applied").blocks_on(patched).checkpoint
    start, sites = weights(mixers), list(mixers.blocks)
    trained, checkpoint, *_ = learn(pack, patched, "flux", blocks=sites[-1]).args
    changed = {key for key, tensor in weights(checkpoint).items() if not torch.equal(tensor, start[key])}
    assert changed and all(key.startswith(sites[-1]) for key in changed)
    assert list(in_pack(pack, "nodes.host.patch.applied").blocks_on(trained).chosen) == sites


def test_landmarks_without_kernels_learn_their_gains_and_kept_attention_stays_kept(pack):
    spec = {"landmarks": 6, "kernel_size": 0}
    _, patched = started(pack, "sd35", ["transformer_blocks.0.attn2", "transformer_blocks.1.attn"], spec)
    _, checkpoint, *_ = learn(pack, patched, "sd35").args
    assert checkpoint.kept == {"transformer_blocks.0.attn": "it is cheap here"}
    assert checkpoint.metadata["sizes"] == "6x8"
    assert {name.rpartition(".")[2] for name in weights(checkpoint)} == {"gain", "mean"}


def test_what_was_learned_loads_in_the_patch_node(pack, tmp_path):
    core = in_pack(pack, "deltaconv_core")
    model, patched = started(pack, "lumina2")
    _, checkpoint, *_ = learn(pack, patched, "lumina2").args
    core.save_checkpoint(checkpoint, tmp_path / "joint.safetensors")
    loaded = core.load_checkpoint(tmp_path / "joint.safetensors")
    assert same_weights(weights(loaded), weights(checkpoint))
    node = in_pack(pack, "nodes.patch_model").PatchModel
    with torch.inference_mode():
        again = node.execute(model, "auto", "all", 0.0, 1.0, "apply", 1.0, deltaconv=loaded).args[0]
    put_on = in_pack(pack, "nodes.host.patch.applied").blocks_on(again)
    assert same_weights(weights(put_on.checkpoint), weights(checkpoint))


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen_image"])
def test_previews_show_attention_beside_the_mixers(pack, name, monkeypatch):
    _, patched = started(pack, name)
    drawn = []
    module = in_pack(pack, "nodes.host.distill.preview")
    monkeypatch.setattr(
        module, "_beside", lambda *pictures: drawn.append(pictures) or module.Image.new("RGB", (8, 8))
    )
    learn(pack, patched, name, preview_every=3)
    (teacher, first), (same, second) = drawn
    assert torch.equal(teacher, same) and teacher.shape == first.shape and teacher.shape[2] == 3
    assert not torch.equal(teacher, first) or not torch.equal(first, second)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_shorter_precisions_learn(pack, precision):
    _, patched = started(pack, "flux")
    losses = learn(pack, patched, "flux", layer_steps=20, preset="custom", precision=precision).args[2][
        "loss"
    ]
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"output_steps": 500}, "set output_steps to 0, got 500"),
        ({"kernel_sizes": "5"}, "set kernel_sizes to 'auto' and form to 'lean', got '5' and 'lean'"),
        ({"form": "released"}, "got 'auto' and 'released'"),
        ({"blocks": "up"}, "up"),
    ],
)
def test_what_joint_mixers_cannot_learn_with_is_refused(pack, output, changes, said):
    _, patched = started(pack, "flux")
    with pytest.raises(ValueError, match=said):
        learn(pack, patched, "flux", **changes)
    assert not output.exists()


def test_without_mixers_on_the_model_it_says_how_to_get_some(pack, output):
    with pytest.raises(
        ValueError, match="this MODEL is flux, .* put ΔConv Convert Model before ΔConv Distill"
    ):
        learn(pack, make_joint("flux"), "flux")
    assert not output.exists()


def test_other_mixers_cannot_resume_a_run(pack):
    model, patched = started(pack, "flux")
    learn(pack, patched, "flux")
    mixers = make_joint_mixers(pack, model, **MIXED)
    next(iter(mixers.blocks.values())).gain += 0.5
    with pytest.raises(ValueError, match="start"):
        learn(pack, with_joint(pack, model, mixers), "flux", resume="test_00001", layer_steps=8)


def test_an_image_that_no_mixer_can_answer_is_named(pack, monkeypatch):
    _, patched = started(pack, "flux")
    module = in_pack(pack, "nodes.host.distill.joint_learning")
    monkeypatch.setattr(module, "layout_of", lambda *_: "tokens were merged")
    with pytest.raises(
        ValueError, match=r"at transformer_blocks.0.attn, since tokens were merged; leave it out"
    ):
        learn(pack, patched, "flux")
