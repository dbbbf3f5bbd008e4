"""The teacher's training: what it is shown, how it learns, and that a stopped run resumes as if it had not
been."""

import csv
import threading

import numpy as np
import pytest
import torch

from demo.study.diffusion import picture_weight
from demo.study.drawings import is_held_out, random_scene
from demo.study.lessons import PLACE_KNOWN, Lessons, draw_timesteps, matters
from demo.study.muon import Muon, orthogonalize
from demo.study.train_teacher import AutocastGradients, Gradients, learning_rate, parse, size_shares, train
from demo.words import SLOTS, VOCABULARY, Prompt


class Tiny(torch.nn.Module):
    """Stands in for the U-Net: same call, a convolution, and the words as a colour."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)
        self.color = torch.nn.Linear(4, 3)

    def forward(self, x, timesteps, context, transformer_options):
        return self.conv(x) + self.color(context.mean(1))[..., None, None]


def tiny_model():
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"unet": Tiny(), "words": torch.nn.Embedding(len(VOCABULARY), 4)})


def test_learning_rate_rises_stays_and_falls():
    rates = [learning_rate(step, 1 - step / 1000, 2.0, decay=0.2, warmup=100) for step in range(1001)]
    assert rates[0] == pytest.approx(0.02)
    assert rates[100:800] == pytest.approx([2.0] * 700)
    assert rates[900] == pytest.approx(1.0) and rates[1000] == 0
    assert learning_rate(999, 0.001, 2.0, decay=0) == 2.0


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (20, 20)])
def test_orthogonalize_levels_the_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, s, v = torch.linalg.svd(orthogonalize(matrix), full_matrices=False)
    assert s.min() > 0.6 and s.max() < 1.3
    level = torch.linalg.svd(matrix, full_matrices=False)
    assert (level.U @ level.Vh * (u @ v)).sum() > 0.99 * min(shape)  # the same directions


def test_muon_learns_a_convolution():
    torch.manual_seed(0)
    wanted, learner = (torch.nn.Conv2d(4, 8, 3, bias=False) for _ in range(2))
    optimizer, errors = Muon(learner.parameters(), lr=0.02), []
    for _ in range(100):
        x = torch.randn(8, 4, 6, 6)
        error = (learner(x) - wanted(x).detach()).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.05 * errors[0]


def test_lessons_depend_on_seed_and_step_only():
    first, again = (Lessons(8, {48: 1, 32: 1}, seed=3)[5] for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)
    other = Lessons(8, {48: 1}, seed=3)
    assert not torch.equal(other[1].pictures, other[2].pictures)


def test_sizes_come_at_their_shares_and_cost_the_same():
    lessons = Lessons(32, size_shares("48:3,32:1"), seed=0, object_weight=1)
    counts = {48: 0, 32: 0}
    for step in range(60):
        pictures = lessons[step].pictures
        counts[pictures.shape[-1]] += 1
        assert abs(pictures[:, 0].numel() - 32 * 48**2) < 0.04 * 32 * 48**2
    assert 5 < counts[32] < 25


def test_held_out_prompts_are_not_shown():
    assert not any(map(is_held_out, Lessons(4, {48: 1}, seed=0).prompts))


def test_words_may_name_another_shape_than_the_picture_shows_but_no_held_out_prompt():
    lessons, rng = Lessons(4, {48: 1}, seed=0, other_shapes=0.5), np.random.default_rng(0)
    told = [lessons.told(prompt, rng) for prompt in lessons.prompts]
    others = sum(words != prompt for words, prompt in zip(told, lessons.prompts, strict=True))
    assert 0.3 < others / len(told) < 0.5
    assert [words[1:] for words in told] == [prompt[1:] for prompt in lessons.prompts]
    assert not any(map(is_held_out, told))


def test_objects_count_more_where_their_place_is_known():
    lesson = Lessons(64, {48: 1}, seed=0, object_weight=6.0)[0]
    heavier = (lesson.weights / picture_weight(lesson.timesteps).view(-1, 1, 1, 1)).round(decimals=3)
    known = lesson.timesteps < PLACE_KNOWN
    assert 10 < known.sum() < 64
    assert set(heavier[known].unique().tolist()) == {1.0, 6.0}
    assert set(heavier[~known].unique().tolist()) == {1.0}
    assert ((heavier[known] == 6).float().mean((1, 2, 3)) > 0.03).all()


def test_what_must_agree_counts_like_an_object():
    rng = np.random.default_rng(0)
    words = {"color": "red", "count": "one", "shape": "circle", "position": "center", "background": "white"}
    share = {
        layout: matters(random_scene(Prompt(layout=layout, **words), rng), 48).mean()
        for layout in SLOTS["layout"]
    }
    assert share["mirror"] == share["stripes"] == 1
    assert share["plain"] < 0.25 and share["plain"] + 0.1 < share["pairs"] < 0.5


def test_timesteps_gather_where_shapes_are_decided():
    small, large = (draw_timesteps(4000, size, np.random.default_rng(0)) for size in (48, 96))
    assert small.min() >= 0 and small.max() < 1000
    assert ((small > 270) & (small < 570)).mean() > 0.5
    assert 50 < np.median(large) - np.median(small) < 100


def test_gradients_of_parts_are_those_of_the_whole():
    lesson, model = Lessons(12, {32: 1}, seed=0)[0], tiny_model()
    whole, parts = Gradients(model, 1), Gradients(model, 3)
    loss, expected = whole.part(lesson, 1.0)
    torch.testing.assert_close(parts(lesson), loss)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)


def test_gradients_in_bf16_are_near_those_in_fp32():
    lesson, model = Lessons(12, {32: 1}, seed=0)[0], tiny_model()
    loss, expected = Gradients(model, 1).part(lesson, 1.0)
    torch.testing.assert_close(AutocastGradients(model, torch.device("cpu"))(lesson), loss, rtol=0.02, atol=0)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert (parameter.grad - gradient).norm() < 0.05 * gradient.norm()


def test_a_run_ends_with_its_time_at_a_rate_of_zero(tmp_path):
    args = arguments(tmp_path, 1000)
    args.minutes, args.decay, args.workers = 2 / 60, 0.5, 1
    train(tiny_model(), args, threading.Event(), shares)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert 1 < state["step"] < 1000
    assert state["optimizers"][0]["param_groups"][0]["lr"] < 0.1 * args.lr


def arguments(folder, steps):
    text = f"--output {folder} --steps {steps} --decay 0 --batch-size 4 --sizes 32:1 --threads 2"
    return parse([*text.split(), "--measure-every", "2"])


def shares(weights):
    assert weights.exists()
    return dict.fromkeys((*SLOTS, "mean", "all", "symmetry"), 0.5)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path):
    straight, resumed = tiny_model(), tiny_model()
    train(straight, arguments(tmp_path / "straight", 4), threading.Event(), shares)
    stop = threading.Event()
    stop.set()  # after its first step
    train(resumed, arguments(tmp_path / "resumed", 4), stop, shares)
    assert torch.load(tmp_path / "resumed" / "state.pt", weights_only=True)["step"] == 1
    train(tiny_model(), arguments(tmp_path / "resumed", 4), threading.Event(), shares)
    one, other = (
        torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("straight", "resumed")
    )
    assert one["step"] == other["step"] == 4 and one["pictures"] == other["pictures"]
    for part in ("model", "ema"):
        for name, value in one[part].items():
            torch.testing.assert_close(other[part][name], value)
    with (tmp_path / "resumed" / "curve.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["step"] for row in rows] == ["2", "4"] and rows[0]["shape"] == "0.500"
