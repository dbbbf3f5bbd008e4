"""The choice between mixer and attention."""

from __future__ import annotations

import pytest
import torch

from deltaconv_core.errors import DeltaConvError
from deltaconv_core.sites.sampling_range import SamplingRange, answer


def percent_to_sigma(percent: float) -> float:
    """A straight line from noise level 10 to 0."""
    return 10.0 * (1.0 - percent)


@pytest.mark.parametrize(
    ("start", "end", "sigmas", "expected"),
    [
        (0.0, 1.0, [10.0], True),
        (0.0, 1.0, [0.0, 3.0], True),
        (0.5, 1.0, [5.0], True),
        (0.5, 1.0, [5.1], False),
        (0.0, 0.5, [5.0], True),
        (0.0, 0.5, [4.9, 1.0], False),
        (0.2, 0.6, [8.0, 4.0], True),
    ],
)
def test_both_ends_belong_to_the_range(start, end, sigmas, expected):
    assert SamplingRange(start, end).choose(torch.tensor(sigmas), percent_to_sigma) is expected


def test_a_scalar_sigma():
    assert SamplingRange(0.0, 0.5).choose(torch.tensor(9.0), percent_to_sigma) is True


def test_samples_of_different_noise_levels_are_answered_one_by_one():
    choice = SamplingRange(0.0, 0.5).choose(torch.tensor([9.0, 1.0, 5.0]), percent_to_sigma)
    assert choice.tolist() == [True, False, True]
    ones, zeros = torch.ones(3, 4, 2), torch.zeros(3, 4, 2)
    assert answer(choice, lambda: ones, lambda: zeros)[:, 0, 0].tolist() == [1, 0, 1]


@pytest.mark.parametrize("choice", [True, False])
def test_one_answer_for_all_runs_one_side_only(choice):
    def forbidden():
        raise AssertionError("this side must not run")

    result = torch.ones(1)
    sides = (lambda: result, forbidden) if choice else (forbidden, lambda: result)
    assert answer(choice, *sides) is result


@pytest.mark.parametrize(
    ("start", "end"), [(0.5, 0.5), (0.6, 0.5), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)]
)
def test_nonsense_is_refused(start, end):
    with pytest.raises(DeltaConvError, match=f"start_percent={start}, end_percent={end}"):
        SamplingRange(start, end)


def test_is_everything():
    assert SamplingRange().is_everything
    assert not SamplingRange(0.0, 0.99).is_everything
