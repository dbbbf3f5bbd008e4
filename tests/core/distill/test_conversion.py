"""Converting a model whose attentions are calls of random tokens, at times that the test sets."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from deltaconv_core import DeltaConvError, load_checkpoint, save_checkpoint
from deltaconv_core.distill import conversion, conversion_report
from deltaconv_core.distill.conversion import Wishes, candidates, fit_and_choose
from deltaconv_core.distill.hybrid import HybridFit

SMOOTH, ROUGH, SMALL = "smooth", "rough", "small"
GRIDS = {SMOOTH: (16, 12), ROUGH: (16, 12), SMALL: (4, 4)}


class Model:
    """Three attentions: of tokens that change slowly over the picture, of noise, and of few tokens."""

    def __init__(self, sites=(SMOOTH, ROUGH, SMALL)):
        self.sites = sites
        self.see = None

    @contextmanager
    def watched(self, see):
        self.see = see
        yield
        self.see = None

    def sample(self, number):
        random = torch.Generator().manual_seed(number)
        for site in self.sites:
            height, width = GRIDS[site]
            tokens = torch.randn(3, 1, 2, height * width, 4, generator=random)
            if site == SMOOTH:
                far = torch.linspace(0, 3, height)[:, None] + torch.linspace(0, 2, width)
                tokens = tokens[..., :1, :] * far.flatten()[:, None].cos()
            for _ in range(2):
                self.see(site, *tokens, (height, width), None)


def specs(sites=(SMOOTH, ROUGH, SMALL)):
    return {site: candidates(8, 2, 4) for site in sites}


@pytest.fixture
def times(monkeypatch):
    """Seconds of a call by number of landmarks, None for attention; others take as long as attention."""
    known = {None: 0.1}

    def alternate(runs, device, repeats, check=lambda: None):
        check()
        for run in runs.values():
            run()
        cells = [None, *(spec.landmarks for spec in candidates(8, 2, 4))][-len(runs) :]
        return {name: [known.get(cells[int(name)], known[None])] for name in runs}

    monkeypatch.setattr(conversion, "alternate", alternate)
    return known


def converted(wishes, model=None, **options):
    model = model or Model()
    return fit_and_choose(specs(), model.watched, model.sample, wishes, **options)


def test_the_fastest_mixer_within_the_error_stands_where_it_is_faster(times):
    times |= {36: 0.02, 64: 0.04}
    result = converted(Wishes(limit=0.1))
    assert list(result.mixers) == [SMOOTH] and result.mixers[SMOOTH].spec.landmarks == 36
    assert "above 0.1" in result.kept[ROUGH] and "attention is cheap here" in result.kept[SMALL]
    assert {layer.site: layer.calls for layer in result.layers} == dict.fromkeys(GRIDS, 2)


@pytest.mark.parametrize("budget", ["quality", "speed"])
def test_a_mixer_that_is_not_faster_never_stands(times, budget):
    times |= dict.fromkeys((36, 64, 144, 256, 576), 0.096)
    result = converted(Wishes(budget, 1.0 if budget == "quality" else 0.1))
    assert not result.mixers and result.seconds[0] == result.seconds[1]
    assert result.checkpoint("sd15", GRIDS, {}).blocks == {}


def test_a_time_budget_is_met_with_the_least_error(times):
    times |= {36: 0.02, 64: 0.04, 144: 0.05}
    one = converted(Wishes("speed", 0.75))
    assert list(one.mixers) == [SMOOTH]
    both = converted(Wishes("speed", 0.5))
    assert list(both.mixers) == [SMOOTH, ROUGH]
    for result, share in ((one, 0.75), (both, 0.5)):
        assert sum(layer.seconds[1] for layer in result.layers) <= 0.1 * 3 * share


def test_the_seed_decides_the_mixers(times):
    times |= {64: 0.04}
    wishes = Wishes("speed", 0.5, pictures=4)
    first, again, other = (
        converted(w).mixers[ROUGH].state_dict() for w in (wishes, wishes, Wishes("speed", 0.5, 4, seed=1))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_report_reckons_with_the_times_of_the_layers(times):
    times |= {36: 0.02, 64: 0.04}
    result = replace(converted(Wishes(limit=0.1)), picture=2.0)
    assert result.seconds == (2.0, pytest.approx(2.0 - 2 * (0.1 - 0.02)))
    rest = 2.0 - 6 * 0.1
    assert result.twice == (pytest.approx(4 * rest + 0.6), pytest.approx(4 * rest + 0.6 - 0.16))
    text = conversion_report.report_text(result, (128, 96), 5)
    assert "1 of 3 self-attentions are replaced" in text and "A picture of 256 x 192, 5 steps" in text
    assert (
        "| smooth |" in text
        and "36 landmarks" in text
        and f"Attention stays at rough: {result.kept[ROUGH]}." in text
    )


def test_with_mixers_no_picture_takes_less_than_no_time(times):
    times |= {36: 0.01}
    result = replace(converted(Wishes("speed", 0.5)), picture=0.3)
    saved = sum((layer.seconds[0] - layer.seconds[1]) * layer.calls for layer in result.layers)
    assert saved > result.picture and result.seconds[1] == pytest.approx(0.3 * (0.6 - saved) / 0.6)
    assert result.twice == (pytest.approx(0.6), pytest.approx(0.6 - saved))


def test_calls_that_would_take_long_at_twice_the_size_are_reckoned(times):
    times |= {None: 2.0, 36: 0.02}
    layer = converted(Wishes(limit=0.1)).layers[0]
    assert layer.twice == (pytest.approx(32.0), pytest.approx(0.02))


def test_what_does_not_fit_at_twice_the_size_is_told(times, monkeypatch):
    times |= {36: 0.02}

    def attend(q, k, v):
        if q.shape[2] > 16 * 12:
            raise torch.OutOfMemoryError
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    result = converted(Wishes(limit=0.1), attend=attend)
    assert result.layers[0].twice[0] == float("inf")
    assert "out of memory before, out of memory after" in conversion_report.report_text(result, (128, 96), 5)
    mixed = replace(converted(Wishes(limit=10.0), attend=attend), picture=0.6)
    assert mixed.twice == (float("inf"), pytest.approx(2 * (0.02 + 0.02 + 0.1)))
    assert "out of memory before, 0.28 s after" in conversion_report.report_text(mixed, (128, 96), 5)


def test_tokens_that_do_not_fit_at_twice_the_size_do_not_stop_a_conversion(times, monkeypatch):
    times |= {36: 0.02}
    randn = torch.randn

    def full(*shape, **options):
        if isinstance(shape[0], tuple) and shape[0][2] > 16 * 12:
            raise torch.OutOfMemoryError
        return randn(*shape, **options)

    monkeypatch.setattr(torch, "randn", full)
    result = converted(Wishes(limit=0.1))
    assert list(result.mixers) == [SMOOTH] and result.layers[0].twice == (float("inf"), float("inf"))


def test_attentions_that_the_last_picture_does_not_call_count_as_in_the_others(times):
    times |= {36: 0.02}

    class Short(Model):
        def sample(self, number):
            if number < 4:
                super().sample(number)

    result = converted(Wishes("speed", 0.8, pictures=5), Short())
    assert {layer.calls for layer in result.layers} == {2}
    assert "of self-attention's time" in conversion_report.report_text(result, (128, 96), 5)


def test_the_sums_of_the_fit_are_gone_when_anything_is_timed(times):
    fits = []

    class Kept(HybridFit):
        def __init__(self, *args):
            super().__init__(*args)
            fits.append(self)

    def attend(q, k, v):
        assert not fits[0]._sums
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    result = converted(Wishes(limit=0.1), attend=attend, fitting=Kept)
    assert len(fits) == 1 and len(result.layers) == 3


def test_weights_of_it_say_why_attention_stays(times, tmp_path):
    times |= {36: 0.02}
    checkpoint = converted(Wishes(limit=0.1)).checkpoint("small", [*GRIDS, "other"], {"teacher": "t"})
    save_checkpoint(checkpoint, tmp_path / "h.safetensors")
    loaded = load_checkpoint(tmp_path / "h.safetensors")
    assert loaded.mixer == "hybrid" and loaded.kept == checkpoint.kept
    assert loaded.kept["other"] == "it was left out of the conversion"
    assert loaded.metadata["teacher"] == "t" and loaded.metadata["budget"] == "quality, 0.1"


def test_attentions_that_are_never_called_stay(times):
    times |= {36: 0.02}
    model = Model((SMOOTH,))
    result = converted(Wishes(limit=0.1), model)
    assert list(result.mixers) == [SMOOTH] and result.kept[ROUGH] == "the model never called it"
    with pytest.raises(DeltaConvError, match="none of the 3 self-attentions was called"):
        converted(Wishes(), Model(()))


def test_a_stop_goes_through(times):
    calls = []

    def check():
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt

    model = Model()
    with pytest.raises(KeyboardInterrupt):
        converted(Wishes(), model, check=check)
    assert len(calls) == 9


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"budget": "cost"}, "'quality' or 'speed', got 'cost'"),
        ({"limit": 0}, "error budget above 0"),
        ({"budget": "speed", "limit": 1.5}, "time budget above 0 and at most 1"),
        ({"pictures": 3}, "at least 4 calibration pictures.* got 3"),
    ],
)
def test_refusals(times, wishes, message):
    with pytest.raises(DeltaConvError, match=message):
        converted(Wishes(**wishes))


def test_errors_are_measured_at_the_size_that_is_wished_for_first():
    """Every fourth picture is held out; of the others each size has half."""
    drawn = [conversion.in_turn(["whole", "half"], number) for number in range(8)]
    assert drawn[3::4] == ["whole", "half"]
    assert sorted(drawn[:3] + drawn[4:7]) == ["half"] * 3 + ["whole"] * 3
    assert {conversion.in_turn(["whole"], number) for number in range(8)} == {"whole"}


def test_of_two_pictures_the_one_that_loads_the_model_is_not_the_measure():
    meter = conversion._Meter(HybridFit(specs()), lambda number: None, lambda: None)
    meter._pictures = [(192, 30.0), (48, 0.5), (192, 2.0)]
    assert meter.picture == 2.0


def test_times_are_measured():
    result = fit_and_choose(specs(), (model := Model()).watched, model.sample, Wishes(limit=1.0))
    assert all(0 < layer.seconds[0] < 1 and 0 < layer.twice[0] < 10 for layer in result.layers)
