"""Where joint mixers run: by times that are taken once for each kind of call."""

from __future__ import annotations

import pytest
import torch

from deltaconv_core.mixers.joint import JointLayout, JointMixer, JointSpec, plan
from deltaconv_core.mixers.joint.plan import Plan


@pytest.fixture
def clock(monkeypatch):
    """Times that are what a test says: of attention for its timed queries, and of the mixer."""
    told = {"attention": [1.0], "mixer": [1.0]}
    asked = []

    def timed(runs, device, repeats):
        asked.append(list(runs))
        for run in runs.values():
            run()
        return told

    monkeypatch.setattr(plan, "alternate", timed)
    return told, asked


def call(grid=(12, 16), text=5, batch=1, heads=2):
    q, k, v = torch.randn(3, batch, heads, text + grid[0] * grid[1], 4)
    return JointMixer(JointSpec(8, heads, 4, landmarks=9, kernel_size=3)), q, k, v, JointLayout(grid, text)


@pytest.mark.parametrize(("mixer", "runs"), [(0.5, True), (0.94, True), (0.96, False), (2.0, False)])
def test_the_mixer_runs_where_it_is_clearly_faster(clock, mixer, runs):
    clock[0]["mixer"] = [mixer]
    found = Plan().verdict(*call())
    assert found.mixer == runs and found.seconds == (1.0, mixer)
    assert ("not faster at this size" in found.reason) != runs and "ms a layer" in found.reason


def test_attention_stays_where_the_mixer_does_not_fit_into_memory(monkeypatch):
    def image(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(JointMixer, "image", image)
    own = Plan()
    found = own.verdict(*call())
    assert not found.mixer and "more memory than there is" in found.reason
    assert own.verdict(*call()) is found


def test_each_kind_of_call_is_timed_once(clock):
    own = Plan()
    for _ in range(2):
        own.verdict(*call())
        own.verdict(*call(grid=(16, 12)))
        own.verdict(*call(batch=2))
        own.verdict(*call(text=6))
    assert len(clock[1]) == 4


def test_attention_is_timed_on_some_of_its_queries(clock, monkeypatch):
    monkeypatch.setattr(plan, "TIMED_QUERIES", 50)
    clock[0]["mixer"] = [3.9]
    mixer, q, k, v, layout = call(grid=(15, 13))
    asked = []

    def attend(q, k, v, mask):
        asked.append((q.shape[2], k.shape[2], None if mask is None else mask.shape[2]))
        return plan.attention(q, k, v, mask)

    mask = torch.zeros(200, 200)
    found = Plan().verdict(mixer, q, k, v, layout, mask, attend)
    assert asked[0] == (50, 200, 50)
    assert found.seconds == (4.0, 3.9) and not found.mixer


def test_an_image_of_few_tokens_is_not_even_timed(clock):
    found = Plan().verdict(*call(grid=(3, 3)))
    assert not found.mixer and "no more tokens than the mixer has landmarks" in found.reason
    assert clock[1] == []


def test_a_mixer_that_is_asked_for_always_runs(clock):
    assert Plan(always=True).verdict(*call(grid=(3, 3))).mixer
    assert clock[1] == []


def test_real_times_say_that_landmarks_pay_for_large_images_only():
    """With all of a large image's tokens against 9 landmarks there is no doubt."""
    assert Plan().verdict(*call(grid=(64, 64))).mixer


@pytest.mark.parametrize(("grid", "runs"), [((64, 64), True), ((4, 3), False), ((3, 3), False)])
def test_code_that_is_compiled_goes_by_operations(clock, monkeypatch, grid, runs):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found = Plan().verdict(*call(grid=grid))
    assert found.mixer == runs and clock[1] == [] and "by operations" in found.reason
