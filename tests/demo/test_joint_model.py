"""The demo's NextDiT: that it learns, in the same training as the U-Net, and that its file makes a MODEL."""

from importlib import import_module
from threading import Event

import pytest
import torch

from demo.files import teacher_file
from demo.study.evaluate import Settings, Size, sample
from demo.study.lessons import Lessons
from demo.study.train_teacher import Gradients, Run, loss_of, make_model, optimizers, parse, train
from demo.words import SLOTS, Prompt


@pytest.fixture(scope="module")
def fresh(pack):
    return make_model(0, None, "joint")


def test_its_file_is_below_14_mib(fresh, tmp_path):
    run = Run(tmp_path)
    run.save({}, fresh.state_dict(), {})
    assert 10 * 2**20 < run.weights.stat().st_size < 14 * 2**20


def test_a_fresh_one_draws_nothing_at_any_size(fresh):
    noisy, context = torch.randn(2, 3, 19, 34), torch.randn(2, 6, 64)
    picture = fresh["unet"](noisy, torch.tensor([3.0, 500.0]), context, 6, transformer_options={})
    assert picture.shape == noisy.shape and not picture.any()


def test_every_weight_learns(pack, monkeypatch):
    monkeypatch.setattr(import_module("comfy.model_management"), "in_training", True, raising=False)
    model, lessons = make_model(0, None, "joint"), Lessons(4, {42: 1.0}, seed=0)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    gradients, chosen = Gradients(model, threads=1), optimizers(model, 1e-2)
    for step in range(4):  # modulations and the last layer start at zero: they come first; 42 needs padding
        gradients(lessons[step])
        for optimizer in chosen:
            optimizer.step()
    unchanged = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    rows = lessons[0].rows.unique()
    assert not [name for name in unchanged if name != "words.weight"]
    assert not torch.equal(model["words"].weight[rows], before["words.weight"][rows])
    assert loss_of(model, lessons[0]).isfinite()


def test_a_guide_gives_the_targets(pack):
    guide, lesson = make_model(0, teacher_file()), Lessons(4, {48: 1.0}, seed=0)[0]
    assert loss_of(guide, lesson) > 1e-3
    assert loss_of(guide, lesson, guide) == 0
    nothing = lesson._replace(
        pictures=torch.zeros_like(lesson.pictures), noise=torch.zeros_like(lesson.noise)
    )
    assert loss_of(make_model(0, None, "joint"), nothing, guide) > 1e-3  # its own pictures are zeros, too


def test_a_guided_training_keeps_the_words_of_its_guide(pack, tmp_path):
    text = f"--output {tmp_path} --guide {teacher_file()} --steps 1 --batch-size 4 --sizes 24:1 --threads 1"
    model, guide = make_model(0, None, "joint"), make_model(0, teacher_file())
    train(model, parse(text.split()), Event(), lambda weights: dict.fromkeys((*SLOTS, "mean", "all"), 0.5))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for part in ("model", "ema"):
        assert torch.equal(state[part]["words.weight"], guide["words"].weight)
        assert state[part]["unet.final_layer.linear.weight"].any()


def test_first_and_last_layer_are_left_to_adamw(fresh):
    muon, adam = (
        {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for optimizer in optimizers(fresh, 1e-3)
    )
    named = dict(fresh.named_parameters())
    assert muon.isdisjoint(adam) and len(muon | adam) == len(named)
    for name in ("words.weight", "unet.x_embedder.weight", "unet.final_layer.linear.weight"):
        assert id(named[name]) in adam
    assert id(named["unet.layers.0.attention.qkv.weight"]) in muon


def test_its_file_makes_a_model_that_samples(pack, fresh, tmp_path):
    unet = import_module(".nodes.host.demo.unet", pack.__name__)
    run = Run(tmp_path)
    torch.nn.init.normal_(fresh["unet"].final_layer.linear.weight, std=0.02)
    run.save({}, fresh.state_dict(), {})
    model, words = unet.load_demo_model(str(run.weights)), unet.load_words(str(run.weights))
    assert type(model.model.diffusion_model).__name__ == "NextDiT"
    own = fresh["unet"].state_dict()
    for name, value in model.model.diffusion_model.state_dict().items():
        torch.testing.assert_close(value, own[name], atol=1e-3, rtol=1e-3)
    size = Size(side=20, prompts=2, steps=2)
    settings = Settings((size,), cfg=3.0, seed=0, batch=2, reference=0, teacher="", classifier="")
    pictures = sample(model, words, [Prompt(), Prompt(shape="circle")], size, settings)
    assert pictures.shape == (2, 20, 20, 3) and pictures.std() > 0
