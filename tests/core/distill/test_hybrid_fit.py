"""Fitting hybrid mixers: planted parameters are found, and the pass leaves nothing to chance."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from deltaconv_core import DeltaConvError
from deltaconv_core.distill import hybrid
from deltaconv_core.distill.budget import within_cost, within_error
from deltaconv_core.distill.hybrid import FitSettings, HybridFit, choose, fit_hybrids
from deltaconv_core.distill.hybrid_sums import add_queries, sums_bytes
from deltaconv_core.errors import CheckpointError
from deltaconv_core.mixers.hybrid import HybridMixer, HybridSpec
from deltaconv_core.mixers.hybrid.features import count, features, unpack
from deltaconv_core.weights.safefile import read_file, write_file

HEADS, WIDTH = 2, 4
LOCAL = HybridSpec(8, HEADS, WIDTH, landmarks=0, nystrom="none", kernel_size=3, scales=(1.0, 0.5), mean=True)
BOTH = replace(LOCAL, landmarks=4)
NYSTROM = HybridSpec(8, HEADS, WIDTH, landmarks=4, kernel_size=3)
GATED = replace(BOTH, gate=True, scales=(1.0, 0.3))
WINDOW = replace(BOTH, window=3)
SPECS = {
    "local": LOCAL,
    "both": BOTH,
    "by channel": replace(BOTH, share="channel"),
    "Nyström": NYSTROM,
    "gate": GATED,
    "window": WINDOW,
}
EXACT = FitSettings(rows=40, ridge=1e-13, held_out=2)


def call(number, grid=(6, 8), batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(number)
    shape = (3, batch, HEADS, grid[0] * grid[1], WIDTH)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).unbind()


def planted(spec):
    generator = torch.Generator().manual_seed(7)
    return unpack(spec, torch.randn(spec.shared, count(spec), generator=generator))


@pytest.mark.parametrize("grid", [(6, 8), (5, 7)])
@pytest.mark.parametrize("share", ["head", "channel"])
def test_planted_kernels_are_recovered(share, grid):
    """From answers that a mixer with known parameters gave."""
    spec = replace(LOCAL, share=share)
    mixer = planted(spec)
    fit = HybridFit({"a": [spec]}, EXACT)
    for number in range(4):
        fit.picture(number)
        q, k, v = call(number, grid, batch=6)
        rows = torch.arange(grid[0] * grid[1])
        both = fit._of("a", q.device)[0]
        x = features(spec, q, k, v, grid, None, rows)
        add_queries(both[number % 2], spec, x, mixer(q, k, v, grid))
    (found,) = fit.fitted()["a"]
    for name, parameter in mixer.named_parameters():
        torch.testing.assert_close(found.mixer.get_parameter(name), parameter, rtol=0, atol=1e-6)
    assert found.error < 1e-6 < 0.1 < found.start_error


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grid", [(6, 8), (5, 7), (1, 9)])
@pytest.mark.parametrize("kind", SPECS)
def test_features_times_parameters_are_the_mixer(kind, grid, masked):
    spec, rows = SPECS[kind], torch.tensor([3, 0, 8, 5])
    mixer = planted(spec)
    q, k, v = call(0, grid)
    mask = torch.rand(2, grid[0] * grid[1], dtype=torch.float64) if masked else None
    parts = [kernel.flatten(1) for kernel in mixer.kernels]
    parts += [mixer.mean[:, None]] if spec.mean else []
    parts += [mixer.gain[:, None]] if spec.landmarks else []
    w = torch.cat(parts, dim=1).double().reshape(HEADS, -1, count(spec)).expand(HEADS, WIDTH, -1)
    y = torch.einsum("bhnfd,hdf->bhnd", features(spec, q, k, v, grid, mask, rows), w)
    torch.testing.assert_close(y, mixer(q, k, v, grid, mask)[:, :, rows], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", SPECS)
def test_streamed_sums_are_the_batch_solution(kind):
    """The same least squares, from all features at once, in whatever pieces they come."""
    spec, grid = SPECS[kind], (5, 7)
    settings = FitSettings(rows=35, ridge=1e-2, held_out=2)
    fit = HybridFit({"a": [spec]}, settings)
    systems = {0: ([], []), 1: ([], [])}
    for number in range(4):
        fit.picture(number)
        q, k, v = call(number, grid)
        fit.see("a", q, k, v, grid)
        x = features(spec, q, k, v, grid, None, torch.arange(35))  # (B, heads, n, F, d)
        systems[number % 2][0].append(x)
        systems[number % 2][1].append(scaled_dot_product_attention(q, k, v))
    x, y = (torch.cat(parts) for parts in systems[0])
    other, wanted = (torch.cat(parts) for parts in systems[1])
    (found,) = fit.fitted()["a"]
    squares = total = 0
    for head in range(HEADS):
        for group in [slice(0, WIDTH)] if spec.share == "head" else [slice(c, c + 1) for c in range(WIDTH)]:
            a = x[:, head, :, :, group].movedim(2, -1).flatten(0, 2)  # (B n d, F)
            rest = y[:, head, :, group].flatten()
            start = torch.zeros(a.shape[1], dtype=a.dtype)
            start[-1] = bool(spec.landmarks)
            gram = a.T @ a
            ridge = settings.ridge * gram.trace() / len(gram) * torch.eye(len(gram), dtype=a.dtype)
            w = start + torch.linalg.solve(gram + ridge, a.T @ (rest - a @ start))
            number = head if spec.share == "head" else head * WIDTH + group.start
            torch.testing.assert_close(
                found.mixer.kernels[0].flatten(1)[number], w[:9].float(), rtol=1e-4, atol=1e-6
            )
            b = other[:, head, :, :, group].movedim(2, -1).flatten(0, 2)
            squares += (wanted[:, head, :, group].flatten() - b @ w).square().sum()
            total += wanted[:, head, :, group].square().sum()
    assert found.error == pytest.approx(float((squares / total).sqrt()), rel=1e-6)


def test_the_reported_error_is_that_of_the_mixer():
    grid = (5, 7)
    fit = HybridFit({"a": [BOTH]}, FitSettings(rows=35, held_out=2))
    for number in range(2):
        fit.picture(number)
        fit.see("a", *call(number, grid), grid)
    (found,) = fit.fitted()["a"]
    full = scaled_dot_product_attention(*call(1, grid))
    for mixer, error in ((found.mixer, found.error), (HybridMixer(BOTH), found.start_error)):
        own = (mixer(*call(1, grid), grid) - full).norm() / full.norm()
        assert error == pytest.approx(float(own.detach()), rel=1e-5)


def parameters(fits):
    return [p for fitted in fits.values() for one in fitted for p in one.mixer.parameters()]


def test_bfloat16_calls_fit_almost_the_same():
    fits = []
    for dtype in (torch.float64, torch.bfloat16):
        fit = HybridFit({"a": [BOTH]}, FitSettings(held_out=2))
        for number in range(4):
            fit.picture(number)
            fit.see("a", *call(number, dtype=dtype), (6, 8))
        fits.append(fit.fitted())
    for own, other in zip(*map(parameters, fits), strict=True):
        torch.testing.assert_close(own, other, rtol=0.02, atol=2e-3)


def test_features_in_pieces_are_the_same(monkeypatch):
    fits = []
    for chunk in (hybrid.FEATURE_BYTES, 1):
        monkeypatch.setattr(hybrid, "FEATURE_BYTES", chunk)
        fit = HybridFit({"a": [BOTH, NYSTROM]}, FitSettings(rows=7, held_out=2))
        for number in range(2):
            fit.picture(number)
            fit.see("a", *call(number), (6, 8))
        fits.append(fit.fitted())
    for own, other in zip(*map(parameters, fits), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-7)


class Model:
    """Calls one attention three times for each picture; stops where it is told to."""

    def __init__(self, stop=None):
        self.see, self.stop, self.seen = None, stop, []

    @contextmanager
    def watched(self, see):
        self.see = see
        yield
        self.see = None

    def sample(self, number):
        for step in range(3):
            if (number, step) == self.stop:
                raise KeyboardInterrupt
            self.see("a", *call(10 * number + step), (6, 8), None)
        self.seen.append(number)


def run(model, state=None, settings=None, specs=(BOTH, NYSTROM), pictures=6):
    settings = settings or FitSettings(rows=9, held_out=3)
    return fit_hybrids(HybridFit({"a": specs}, settings), model.watched, model.sample, pictures, state)


def test_is_the_same_after_a_stop_at_any_call(tmp_path):
    wanted = parameters(run(Model()))
    for number, step in [(0, 1), (2, 0), (5, 2)]:
        state = tmp_path / f"{number}.safetensors"
        stopped, resumed = Model((number, step)), Model()
        with pytest.raises(KeyboardInterrupt):
            run(stopped, state)
        found = parameters(run(resumed, state))
        assert resumed.seen == list(range(number, 6))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_another_seed_looks_at_other_queries():
    one, two, again = (
        parameters(run(Model(), settings=FitSettings(9, held_out=3, seed=s))) for s in (0, 1, 0)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"settings": FitSettings(8, held_out=3)}, "other settings"), ({"specs": (BOTH,)}, "other candidates")],
)
def test_a_state_of_another_fit_is_refused(tmp_path, change, message):
    run(Model(), tmp_path / "state.safetensors")
    with pytest.raises(DeltaConvError, match=message):
        run(Model(), tmp_path / "state.safetensors", **change)


def test_a_file_that_is_not_a_state_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "state.safetensors", {"other": "thing"})
    with pytest.raises(CheckpointError, match="not the state of a fit"):
        run(Model(), tmp_path / "state.safetensors")


NAME = "a/0/0/gram"
CHANGED_VALUES = {
    "number": {"picture": "5"},
    "number, true": {"picture": True},
    "number below": {"picture": -1},
    "no grids": {"grids": []},
    "grid of one side": {"grids": {"a": [6]}},
    "grid of fractions": {"grids": {"a": [6.0, 8]}},
    "grid of nothing": {"grids": {"a": [6, 0]}},
    "grid as a text": {"grids": {"a": "68"}},
    "another site": {"grids": {"a": [6, 8], "b": [6, 8]}},
    "no site": {"grids": {}},
}
CHANGED_SUMS = {
    "gone": lambda sums: sums.pop(NAME),
    "unknown": lambda sums: sums.update(x=torch.zeros(1)),
    "number of candidate": lambda sums: sums.update({"a/2/0/gram": sums.pop(NAME)}),
    "shape": lambda sums: sums.update({NAME: sums[NAME][:, :1].clone()}),
    "dtype": lambda sums: sums.update({NAME: sums[NAME].float()}),
    "no dimension": lambda sums: sums.update({NAME: torch.zeros(())}),
    "square below zero": lambda sums: sums[NAME].diagonal(dim1=1, dim2=2).sub_(1e9),
    "answers below zero": lambda sums: sums["a/1/1/answers"].neg_(),
}


@pytest.mark.parametrize("damage", [*CHANGED_VALUES, *CHANGED_SUMS])
def test_a_damaged_state_is_refused_and_nothing_of_it_taken(tmp_path, damage):
    path = tmp_path / "state.safetensors"
    run(Model(), path)
    header, sums = read_file(path)
    described = json.loads(header[hybrid.FIT_KEY]) | CHANGED_VALUES.get(damage, {})
    CHANGED_SUMS.get(damage, lambda sums: None)(sums)
    write_file(path, sums, {hybrid.FIT_KEY: json.dumps(described)})
    fit = HybridFit({"a": (BOTH, NYSTROM)}, FitSettings(rows=9, held_out=3))
    with pytest.raises(CheckpointError, match=r"state\.safetensors is not .*state of a fit"):
        fit.restore(path)
    assert (fit.pictures, fit.grids, fit._sums) == (0, {}, {})


def test_sums_without_one_best_solution_are_refused():
    fit = HybridFit({"a": (BOTH,)}, FitSettings(ridge=0, held_out=2))
    for number in range(2):
        fit.picture(number)
        fit.see("a", *(torch.ones_like(part) for part in call(number)), (6, 8))
    with pytest.raises(DeltaConvError, match="one best solution with a ridge of 0; choose a larger one"):
        fit.fitted()


def test_numbers_that_are_not_finite_are_refused():
    fit = HybridFit({"a": (BOTH,)}, FitSettings(held_out=2))
    for number in range(2):
        fit.picture(number)
        q, k, v = call(number)
        v[0, 0, 3, 0] = math.nan
        fit.see("a", q, k, v, (6, 8))
    with pytest.raises(DeltaConvError, match="computed NaN or infinite numbers.* in bfloat16 or float32"):
        fit.fitted()


def test_too_few_pictures_are_refused():
    with pytest.raises(DeltaConvError, match="at least 3 pictures, .* got 2"):
        run(Model(), pictures=2)


def test_memory_is_that_of_the_sums_and_known_before():
    """Whatever the pictures: what the fit holds after two large ones is what it said."""
    specs = [BOTH, replace(BOTH, share="channel")]
    fit = HybridFit({"a": specs}, FitSettings(held_out=2))
    for number, grid in enumerate([(6, 8), (30, 40)]):
        fit.picture(number)
        fit.see("a", *call(number, grid), grid)
    held = sum(
        t.numel() * t.element_size()
        for both in fit._sums["a"]
        for sums in both
        for t in sums.tensors().values()
    )
    assert held == sums_bytes(specs)
    with pytest.raises(DeltaConvError, match="share kernels by head"):
        HybridFit({"a": specs}, FitSettings(memory=held - 1))
    HybridFit({"a": specs}, FitSettings(memory=held))


@pytest.mark.parametrize("kind", ["mps", "xpu", "privateuseone"])
def test_sums_are_on_the_cpu_where_a_gpu_may_have_no_float64(kind):
    ((own, held_out),) = HybridFit({"a": [BOTH]})._of("a", torch.device(kind))
    assert own.gram.device.type == held_out.gram.device.type == "cpu"


def test_sd15_at_full_size_fits_into_a_gibibyte():
    """By head, 7 x 7 kernels at two scales, the mean and the landmarks, three candidates at all 16 sites."""
    widths = {320: 5, 640: 5, 1280: 6}
    specs = [
        HybridSpec(width, 8, width // 8, landmarks=p, kernel_size=7, scales=(1.0, 0.5), mean=True)
        for width, sites in widths.items()
        for p in (16, 64, 144) * sites
    ]
    assert sums_bytes(specs) + 2 * hybrid.FEATURE_BYTES < 2**30


def test_sites_that_nobody_asked_for_and_that_are_never_called():
    fit = HybridFit({"a": [BOTH], "b": [BOTH]}, FitSettings(held_out=2))
    for number in range(2):
        fit.picture(number)
        fit.see("a", *call(number), (6, 8))
        fit.see("c", *call(number), (6, 8))
    assert list(fit.fitted()) == ["a"] and fit.grids == {"a": (6, 8)}


def test_an_attention_that_answers_nothing_has_no_finite_error():
    fit = HybridFit({"a": [BOTH]}, FitSettings(held_out=2))
    for number in range(2):
        fit.picture(number)
        q, k, v = call(number)
        fit.see("a", q, k, 0 * v, (6, 8))
    (one,) = fit.fitted()["a"]
    assert one.error == one.start_error == math.inf


@pytest.mark.parametrize("change", [{"rows": 0}, {"ridge": -1.0}, {"held_out": 1}, {"memory": 0}])
def test_settings_refuse_nonsense(change):
    with pytest.raises(DeltaConvError, match=next(iter(change))):
        FitSettings(**change)


def fitted_sites():
    """One attention over many tokens, one over few, and one that is never called."""
    few = replace(BOTH, landmarks=16)
    fit = HybridFit({"large": [BOTH, few], "small": [BOTH, few], "never": [BOTH]}, FitSettings(held_out=2))
    for number in range(4):
        fit.picture(number)
        fit.see("large", *call(number, (24, 32)), (24, 32))
        fit.see("small", *call(number, (2, 2)), (2, 2))
    return fit, fit.fitted()


def test_a_budget_decides_what_is_replaced_and_says_why():
    fit, fitted = fitted_sites()
    chosen = choose(fit, fitted, lambda sites: within_error(sites, 2.0))
    assert chosen.mixers == {"large": fitted["large"][0].mixer}
    assert chosen.kept["never"] == "the model never called it"
    assert "attention is cheap here" in chosen.kept["small"]
    assert "of attention's cost" in chosen.decisions["large"].reason
    assert not choose(fit, fitted, lambda sites: within_error(sites, 1e-3)).mixers


def test_measured_times_may_decide():
    fit, fitted = fitted_sites()
    seconds = {("large", None): 3.0, ("small", None): 1.0, ("large", 4): 2.0, ("small", 4): 0.5}

    def cost(site, spec):
        return seconds.get((site, spec and spec.landmarks), 9.0)

    chosen = choose(fit, fitted, lambda sites: within_cost(sites, 0.7), cost)
    assert set(chosen.mixers) == {"large", "small"} and chosen.mixers["small"].spec.landmarks == 4


def test_attention_costs_what_its_products_do():
    fit, _ = fitted_sites()
    tokens = 24 * 32
    assert fit.flops("large", None) == 8 * tokens * 8**2 + 4 * tokens**2 * 8
