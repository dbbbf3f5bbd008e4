"""The measures by hand: Gaussians of known distance, words, PSNR; and what the classifier reads."""

import numpy as np
import pytest
import torch

from deltaconv_core import DeltaConvError
from demo.files import classifier_file
from demo.study.classifier import (
    Classifier,
    feature_moments,
    frechet_distance,
    load_classifier,
    moments,
    save_classifier,
    word_numbers,
)
from demo.study.drawings import as_seen, is_held_out
from demo.study.metrics import (
    difference,
    drawings,
    finite_psnr,
    frechet,
    held_out_prompts,
    measure,
    reference_moments,
    word_errors,
    word_shares,
    words_right,
)
from demo.words import SLOTS, Prompt


def rotated(variances, seed):
    """A covariance with these eigenvalues, in a random orthogonal basis."""
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(variances),) * 2))[0]
    return basis @ np.diag(variances) @ basis.T


@pytest.mark.parametrize(
    ("shift", "first", "second", "expected"),
    [
        ([0, 0, 0], [1, 2, 3], [1, 2, 3], 0.0),
        ([3, 0, 4], [1, 2, 3], [1, 2, 3], 25.0),
        ([0, 0, 0], [1, 4, 9], [4, 4, 1], 1 + 0 + 4),  # sum of (a - b)² of the standard deviations
        ([1, 1, 0], [1, 0, 9], [4, 0, 0], 2 + 1 + 9),  # covariances without an inverse
    ],
)
def test_frechet_distance_of_known_gaussians(shift, first, second, expected):
    mean = np.array([5.0, -1.0, 2.0])
    here, there = (mean, rotated(first, 0)), (mean + shift, rotated(second, 0))
    assert frechet_distance(here, there) == pytest.approx(expected, abs=1e-6)
    assert frechet_distance(there, here) == pytest.approx(expected, abs=1e-6)


def test_frechet_distance_of_covariances_that_do_not_commute():
    sqrtm = pytest.importorskip("scipy.linalg").sqrtm
    one, two = rotated([1, 5, 2, 0.1], 1), rotated([3, 0.5, 2, 7], 2)
    expected = np.trace(one + two - 2 * sqrtm(one @ two).real)
    assert frechet_distance((np.zeros(4), one), (np.zeros(4), two)) == pytest.approx(expected)


def test_frechet_distance_of_samples_nears_that_of_their_gaussians():
    rng = np.random.default_rng(0)
    one, two = rng.normal(0, 1, (20000, 3)), rng.normal(1, 2, (20000, 3))
    assert frechet_distance(moments(one), moments(two)) == pytest.approx(3 * (1 + 1), rel=0.05)


def test_one_picture_has_no_covariance():
    with pytest.raises(ValueError, match="got 1"):
        moments(np.zeros((1, 3)))


@pytest.fixture(scope="module")
def classifier():
    return load_classifier(classifier_file())


@pytest.mark.parametrize("size", [48, 96])
def test_shipped_classifier_reads_held_out_drawings(classifier, size):
    prompts = held_out_prompts(200, seed=3)
    pictures = drawings(prompts, size, np.random.default_rng(5))
    logits = classifier(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1)
    words = word_numbers(prompts)
    for i, (slot, values) in enumerate(logits.items()):
        least = 0.93 if slot == "shape" else 0.97
        assert (values.argmax(1) == words[:, i]).float().mean() > least, slot
    assert classifier_file().stat().st_size < 600_000


@pytest.mark.parametrize("size", [48, 96])
def test_distance_tells_drawings_from_worse_ones(classifier, size):
    prompts = held_out_prompts(100, seed=3)
    reference = reference_moments(classifier, prompts, size, 400, seed=0)
    right = drawings(prompts, size, np.random.default_rng(0))
    noise = np.random.default_rng(1).normal(0, 25, right.shape)
    noisy = np.clip(right + noise, 0, 255).astype(np.uint8)
    others = drawings([p._replace(shape="circle") for p in prompts], size, np.random.default_rng(0))
    floor = frechet_distance(feature_moments(classifier, right), reference)
    for worse in (noisy, others):
        assert frechet_distance(feature_moments(classifier, worse), reference) > 1.3 * floor


def test_classifier_survives_its_file(tmp_path):
    torch.manual_seed(0)
    made = Classifier()
    save_classifier(made, tmp_path / "c.safetensors", {"title": "test"})
    read = load_classifier(tmp_path / "c.safetensors")
    pictures = torch.rand(2, 3, 33, 40) * 2 - 1  # any size
    torch.testing.assert_close(read.penultimate(pictures), made.penultimate(pictures), atol=3e-3, rtol=0)


def test_held_out_prompts_are_held_out_and_different():
    prompts = held_out_prompts(613, seed=1)
    assert len(set(prompts)) == 613 and all(map(is_held_out, prompts))
    with pytest.raises(ValueError, match="got 614"):
        held_out_prompts(614, seed=1)


def test_words_are_looked_up_in_the_pictures():
    prompts = [
        Prompt("square", "green", "two", "top", "gray", "frame"),
        Prompt("circle", "red", "one", "right", "white", "mirror"),
    ]
    pictures = drawings(prompts, 48, np.random.default_rng(0))
    assert words_right(pictures, prompts).all()
    wrong = [prompts[0]._replace(color="red"), prompts[1]._replace(count="two", layout="plain")]
    expected = np.ones((2, 6), bool)
    expected[0, 1] = expected[1, 2] = expected[1, 5] = False
    np.testing.assert_array_equal(words_right(pictures, wrong)[0], expected[0])
    assert words_right(pictures, wrong)[1, 5] == expected[1, 5]


def test_word_shares_by_hand():
    right = np.array([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0], [1, 1, 0, 1, 1, 1]], bool)
    layouts = ("mirror", "mirror", "plain")
    shares = word_shares(right, [Prompt(layout=layout) for layout in layouts])
    assert shares["shape"] == pytest.approx(2 / 3) and shares["color"] == 1
    assert shares["symmetry"] == pytest.approx(1 / 2)
    assert shares["mean"] == pytest.approx(15 / 18) and shares["all"] == pytest.approx(1 / 3)
    assert "symmetry" not in word_shares(right, [Prompt(layout="plain")] * 3)


def test_difference_is_paired():
    mean, error = difference(np.array([1, 0, 1, 1]), np.array([0, 0, 1, 0]))
    assert mean == pytest.approx(0.5) and error == pytest.approx(np.std([1, 0, 0, 1], ddof=1) / 2)
    assert difference(np.array([True, False]), np.array([True, False])) == (0, 0)


def test_word_errors_by_hand():
    right = np.array([[1] * 6, [0, 1, 1, 1, 1, 0], [1, 1, 0, 1, 1, 1], [1] * 6], bool)
    errors = word_errors(right, [Prompt(layout=layout) for layout in ("mirror", "mirror", "plain", "plain")])
    assert errors["shape_error"] == pytest.approx(np.std([1, 0, 1, 1], ddof=1) / 2)
    assert errors["symmetry_error"] == pytest.approx(np.std([1, 0], ddof=1) / np.sqrt(2))
    assert errors["mean_error"] == pytest.approx(np.std([1, 4 / 6, 5 / 6, 1], ddof=1) / 2)
    assert errors["color_error"] == 0


def test_frechet_error_is_how_far_such_distances_lie_apart():
    rng = np.random.default_rng(0)
    reference = moments(rng.normal(0, 1, (4000, 4)))
    found = [frechet(rng.normal(0.5, 1, (200, 4)), reference) for _ in range(60)]
    spread = np.std([distance for distance, _ in found])
    assert 0.7 * spread < np.mean([error for _, error in found]) < 1.4 * spread


def test_three_pictures_are_too_few():
    with pytest.raises(DeltaConvError, match="at least 4 pictures .* got 3; sample more"):
        frechet(np.eye(3), (np.zeros(3), np.eye(3)))


def test_psnr_by_hand():
    black = np.zeros((2, 4, 4, 3), np.uint8)
    other = black.copy()
    other[0] = 51  # a fifth of the range: 13.98 dB
    assert finite_psnr(other, black) == pytest.approx([20 * np.log10(5), 58.92], abs=0.01)


def test_measure_of_the_teacher_itself_is_no_difference(classifier):
    prompts = held_out_prompts(20, seed=0)
    pictures = drawings(prompts, 48, np.random.default_rng(0))
    reference = reference_moments(classifier, prompts, 48, 40, seed=0)
    table = measure(pictures, prompts, classifier, reference, pictures)
    assert table["frechet_ratio"] == 1 and table["all_difference"] == 0 and table["psnr"] > 58
    assert table.keys() >= {*SLOTS, "mean", "all", "frechet", "frechet_error", "psnr_error"}
    assert len(table["words"]) == 20 and table["words"].count("6") == round(20 * table["all"])
    assert "psnr" not in measure(pictures, prompts, classifier, reference)


def test_mirrored_columns_count_on_either_side():
    prompt = Prompt("circle", "red", "one", "right", "white", "mirror")
    assert as_seen(prompt).position == "left"
    assert as_seen(prompt._replace(layout="plain")).position == "right"
