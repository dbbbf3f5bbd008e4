"""The drawings keep their promises, and the detector reads them back."""

import numpy as np
import pytest

from demo.study.detector import read_picture
from demo.study.drawings import as_seen, draw, every_prompt, is_held_out, random_scene
from demo.words import ANY, SLOTS, VOCABULARY, Prompt, parse_prompt, token_rows


def drawn(count: int, size: int, seed: int = 1):
    rng = np.random.default_rng(seed)
    prompts = every_prompt()
    for _ in range(count):
        prompt = prompts[rng.integers(len(prompts))]
        yield prompt, draw(random_scene(prompt, rng), size)


@pytest.mark.parametrize(("size", "share"), [(48, 0.99), (64, 0.99), (96, 0.995)])
def test_detector_reads_drawings(size, share):
    right = [read_picture(picture).prompt == as_seen(prompt) for prompt, picture in drawn(400, size)]
    assert np.mean(right) >= share


@pytest.mark.parametrize("slot", ["color", "background"])
def test_detector_never_mistakes_colors(slot):
    for prompt, picture in drawn(400, 48):
        assert getattr(read_picture(picture).prompt, slot) == getattr(prompt, slot), prompt


@pytest.mark.parametrize("slot", SLOTS)
def test_detector_sees_a_wrong_word(slot):
    """Every other word in this slot is reported as not fulfilled: the accuracy can fall."""
    prompt = Prompt("square", "green", "two", "top", "gray", "frame")
    reading = read_picture(draw(random_scene(prompt, np.random.default_rng(3)), 48))
    assert reading.prompt == prompt
    for word in SLOTS[slot]:
        expected = word == getattr(prompt, slot)
        assert reading.matches(prompt._replace(**{slot: word}))[slot] is expected


@pytest.mark.parametrize("picture", [np.zeros((48, 48, 3), np.uint8), np.full((48, 48, 3), 128, np.uint8)])
def test_detector_reads_nothing_from_an_empty_picture(picture):
    reading = read_picture(picture).prompt
    assert (reading.shape, reading.color, reading.count, reading.position) == (ANY, ANY, ANY, ANY)


def test_mirror_layout_is_symmetric_and_others_need_not_be():
    symmetry = {layout: [] for layout in SLOTS["layout"]}
    for prompt, picture in drawn(400, 48):
        symmetry[prompt.layout].append(np.abs(picture.astype(int) - picture[:, ::-1]).mean())
    assert max(symmetry["mirror"]) < 0.01
    assert max(symmetry["plain"]) > 10


def test_same_seed_draws_the_same_picture():
    first, second = (np.stack([picture for _, picture in drawn(5, 33)]) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_held_out_prompts_are_a_tenth():
    prompts = every_prompt()
    assert len(prompts) == len(set(prompts)) == np.prod([len(words) for words in SLOTS.values()])
    assert 0.08 < np.mean([is_held_out(prompt) for prompt in prompts]) < 0.12


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        (
            "two red circles on the left, white background, mirror",
            Prompt("circle", "red", "two", "left", "white", "mirror"),
        ),
        ("Crosses in the middle; GREY", Prompt(shape="cross", position="center", background="gray")),
        ("3 diamonds", Prompt(shape="diamond", count="three")),
        ("blue blue", Prompt(color="blue")),
        ("", Prompt()),
    ],
)
def test_prompts_are_parsed(text, prompt):
    assert parse_prompt(text) == prompt


@pytest.mark.parametrize(
    ("text", "named"), [("a red cat", "'cat'"), ("red blue", "both name the color"), ("gas", "'gas'")]
)
def test_prompts_that_cannot_be_understood_say_why(text, named):
    with pytest.raises(ValueError, match=named):
        parse_prompt(text)


def test_every_word_has_its_own_row():
    rows = {
        row
        for slot, words in SLOTS.items()
        for word in (*words, ANY)
        for row in [token_rows(Prompt(**{slot: word}))[list(SLOTS).index(slot)]]
    }
    assert rows == set(range(len(VOCABULARY)))
