"""What stands in for the joint attention of the demo's NextDiT: places, costs, fits and training."""

from importlib import import_module

import pytest
import torch

from deltaconv_core.mixers.joint import JointLayout, JointMixer
from deltaconv_core.mixers.joint.module import attention
from demo.study import compare_joint
from demo.study.joint_students import (
    MIXERS,
    Override,
    Teacher,
    checkpoint,
    distance,
    fit,
    gflop,
    put,
    train,
    window_attention,
    windows,
)
from demo.study.lessons import Lessons
from demo.study.train_teacher import Run, make_model
from testing.comfy_joint_models import with_joint

SIZES = {32: 1.0}  # sides of the pictures


@pytest.fixture(scope="module")
def file(pack, tmp_path_factory):
    model, run = make_model(0, None, "joint"), Run(tmp_path_factory.mktemp("joint"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaLN" in name or "final_layer" in name:
                parameter.normal_(std=0.05)
    run.save({}, model.state_dict(), {})
    return run.weights


@pytest.fixture(scope="module")
def teacher(file):
    return Teacher(file)


@pytest.fixture
def lesson(teacher):
    return teacher.lesson(Lessons(1, SIZES, seed=1), 0)


@torch.no_grad()
def test_attention_in_its_own_place_changes_nothing(teacher, lesson):
    seen = []

    def again(site, q, k, v, layout):
        seen.append((site, layout.start, q.shape[2]))
        return attention(q, k, v, None)

    grid = teacher.grid(*lesson.pictures.shape[2:])
    other = teacher.predict(lesson, Override(teacher, grid, again))
    torch.testing.assert_close(other, teacher.predict(lesson), atol=1e-5, rtol=1e-5)
    assert [site for site, *_ in seen] == list(teacher.sites)
    # 6 words filled up to 8 tokens, and 11 x 11 of the image to 128
    assert [place for _, *place in seen] == [[0, 128], *[[8, 136]] * 4]


@torch.no_grad()
def test_landmarks_for_every_token_change_nothing(teacher, lesson):
    shape = {"landmarks": 121, "kernel_size": 0}
    stands = {site: JointMixer(teacher.spec(site, shape)) for site in teacher.sites}
    assert distance(teacher, stands, lesson, teacher.predict(lesson)) < 1e-9


def test_windows_all_show_as_many():
    near = windows((12, 15), 5).unflatten(0, (12, 15)).unflatten(2, (12, 15))
    assert (near.sum((2, 3)) == 25).all()
    assert near[6, 7, 4:9, 5:10].all() and near[0, 0, :5, :5].all() and near[11, 14, 7:, 10:].all()
    assert windows((3, 4), 9).all()


@torch.no_grad()
def test_a_window_over_the_whole_image_is_attention():
    q, k, v = torch.randn(3, 2, 2, 55, 8, generator=torch.manual_seed(0)).unbind(0)
    layout = JointLayout((7, 7), start=4)  # and two more after it
    torch.testing.assert_close(window_attention(q, k, v, layout), attention(q, k, v, None))
    layout = JointLayout((1, 51), start=4)
    some, whole = window_attention(q, k, v, layout), attention(q, k, v, None)
    assert torch.equal(some[:, :, :4], whole[:, :, :4])
    assert (some[:, :, 4:] - whole[:, :, 4:]).abs().amax(3).min() > 1e-4


def test_all_cost_about_the_same(teacher):
    stands = {
        name: {site: JointMixer(teacher.spec(site, shape)) for site in teacher.sites}
        for name, shape in MIXERS.items()
    } | {"window": dict.fromkeys(teacher.sites, window_attention)}
    taken = {name: gflop(teacher, these, (32, 32), 0.0) for name, these in stands.items()}
    assert max(taken.values()) < 0 and max(taken.values()) - min(taken.values()) < 0.03 * -min(taken.values())


def test_training_brings_it_nearer_than_the_fit(teacher, lesson):
    fitted = fit(teacher, Lessons(1, SIZES, seed=5), 4)
    assert fitted.keys() == MIXERS.keys()
    mixers = {site: one.mixer for site, one in fitted["hybrid"].items()}
    with torch.no_grad():
        wanted = teacher.predict(lesson)
        plain = {site: JointMixer(mixer.spec) for site, mixer in mixers.items()}
        start, own = (distance(teacher, these, lesson, wanted) for these in (plain, mixers))
    assert own < start
    losses = train(teacher, mixers, [lesson] * 6, 6, 3e-3)
    assert losses[0] == pytest.approx(own.item(), rel=1e-3) and losses[-1] < losses[0]
    assert not any(parameter.requires_grad for mixer in mixers.values() for parameter in mixer.parameters())


def test_patch_model_draws_the_same_with_the_weights(pack, teacher):
    generator, mixers = torch.manual_seed(2), {}
    for site in teacher.sites:
        mixers[site] = JointMixer(teacher.spec(site, {"landmarks": 9, "kernel_size": 3})).requires_grad_(
            False
        )
        for parameter in mixers[site].parameters():
            parameter.normal_(std=0.2, generator=generator)
    weights = checkpoint(teacher, mixers, {})
    outputs = []
    for model in (put(teacher, mixers), with_joint(pack, teacher.model, weights), teacher.model):
        noise = torch.randn(1, 3, 18, 22, generator=torch.manual_seed(3))
        words = [[teacher.words[None, :6], {}]]
        sample = import_module("comfy.sample").sample
        given = (2, 3.0, "euler", "normal", words, words, torch.zeros_like(noise))
        outputs.append(sample(model, noise, *given, disable_pbar=True))
    own, patched, plain = outputs
    torch.testing.assert_close(own, patched, atol=1e-4, rtol=1e-4)
    assert (own - plain).abs().max() > 1e-3


def test_the_command_measures_each_and_continues(file, tmp_path, capsys):
    few = "--fit-batches 4 --train-steps 1 --batch-size 1 --sizes 20:1 --prompts 4 --prompts-large 0"
    words = f"--teacher {file} --output {tmp_path} {few} --steps 1 --reference 8"
    args = compare_joint.parse(words.split())
    compare_joint.run(args)
    told = capsys.readouterr().out
    for name in ("attention", "hybrid", "hybrid, trained", "kernels", "pooled", "window"):
        assert f"| {name} |" in told
    compare_joint.run(args)
    again = capsys.readouterr().out
    assert "4 pictures of 48x48" in told and "pictures of 48x48" not in again and "losses" not in again
