"""Joint mixers fitted to the attention of text and image: what is exact aside, at several sizes at once."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from deltaconv_core import load_checkpoint, save_checkpoint
from deltaconv_core.distill import conversion, conversion_report
from deltaconv_core.distill.conversion import Wishes, fit_and_choose, joint_candidates
from deltaconv_core.distill.hybrid import FitSettings
from deltaconv_core.distill.joint_fit import JointFit
from deltaconv_core.mixers.hybrid.features import count
from deltaconv_core.mixers.joint import JointLayout, JointMixer, JointSpec
from deltaconv_core.mixers.joint.joint_features import joint_features
from deltaconv_core.mixers.joint.module import attention

HEADS, WIDTH, TEXT, AFTER = 2, 4, 3, 2
SPEC = JointSpec(8, HEADS, WIDTH, landmarks=6, kernel_size=3, scales=(1.0, 0.5))
PLAIN = JointSpec(8, HEADS, WIDTH, landmarks=6, kernel_size=0)
WINDOW = replace(SPEC, window=5)


def planted(spec):
    mixer, generator = JointMixer(spec), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return mixer.requires_grad_(False)


def call(number, grid=(6, 8), dtype=torch.float64, batch=2, key_heads=HEADS):
    generator, tokens = torch.Generator().manual_seed(number), TEXT + grid[0] * grid[1] + AFTER
    q = torch.randn(batch, HEADS, tokens, WIDTH, generator=generator).to(dtype)
    k, v = torch.randn(2, batch, key_heads, tokens, WIDTH, generator=generator).to(dtype)
    return q, k, v, JointLayout(grid, TEXT)


@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize("masked", ["no", "keys", "queries"])
@pytest.mark.parametrize("grid", [(6, 8), (5, 7), (1, 9)])
@pytest.mark.parametrize("spec", [SPEC, PLAIN, WINDOW], ids=["kernels", "plain", "window"])
def test_exact_part_and_features_times_parameters_are_the_mixer(spec, grid, masked, key_heads):
    mixer, rows = planted(spec), torch.tensor([3, 0, 8, 5])
    q, k, v, layout = call(0, grid, key_heads=key_heads)
    mask = None
    if masked == "keys":
        mask = torch.randn(2, 1, 1, k.shape[2], dtype=torch.float64)
    elif masked == "queries":
        mask = torch.randn(1, 1, q.shape[2], k.shape[2], dtype=torch.float64)
        mask[:, :, layout.image, layout.image] = mask[:, :, layout.image, layout.image][..., :1].clone()
    parts = [kernel.flatten(1) for kernel in getattr(mixer, "kernels", [])]
    w = torch.cat([*parts, mixer.mean[:, None], mixer.gain[:, None]], dim=1).double()
    assert w.shape[1] == count(spec)
    x, exact = joint_features(spec, q, k, v, layout, mask, rows)
    y = exact + torch.einsum("bhnfd,hf->bhnd", x, w)
    expected = mixer(q, k, v, layout, mask)[:, :, layout.image][:, :, rows]
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


def test_planted_parameters_are_found(monkeypatch):
    """Where attention's answers are a mixer's, at two sizes."""
    from deltaconv_core.distill import joint_fit

    mixer = planted(SPEC).double()
    fit = JointFit({"a": [SPEC]}, FitSettings(rows=60, ridge=1e-9, held_out=2))
    for number in range(6):
        q, k, v, layout = call(number, [(6, 8), (7, 9)][number // 2 % 2], batch=4)
        y = mixer(q, k, v, layout)[:, :, layout.image]

        def answered(q, k, v, mask, y=y, number=number):
            order = torch.randperm(y.shape[2], generator=_order("a 0", number))[: q.shape[2]]
            return y[:, :, order]

        monkeypatch.setattr(joint_fit, "attention", answered)
        fit.picture(number)
        fit.see("a", q, k, v, layout)
    (found,) = fit.fitted()["a"]
    for name, parameter in mixer.named_parameters():
        torch.testing.assert_close(found.mixer.get_parameter(name), parameter.float(), rtol=1e-4, atol=1e-4)
    assert found.error < 1e-5 < 0.1 < found.start_error and fit.grids == {"a": (7, 9)}


def _order(call, number):
    from deltaconv_core.distill.order import generator

    return generator(0, call, number)


@pytest.mark.parametrize("spec", [SPEC, WINDOW], ids=["kernels", "window"])
def test_the_reported_error_is_that_of_the_mixer(spec):
    """Of the answers to the image's queries, with what is exact in them."""
    fit = JointFit({"a": [spec]}, FitSettings(rows=48, held_out=2))
    for number in range(2):
        fit.picture(number)
        fit.see("a", *call(number))
    (found,) = fit.fitted()["a"]
    q, k, v, layout = call(1)
    full = attention(q, k, v, None)[:, :, layout.image]
    for mixer, error in ((found.mixer, found.error), (JointMixer(spec), found.start_error)):
        own = (mixer(q, k, v, layout)[:, :, layout.image] - full).norm() / full.norm()
        assert error == pytest.approx(float(own.detach()), rel=1e-5)


def test_a_fit_continues_after_a_stop(tmp_path):
    def run(fit, numbers):
        for number in numbers:
            fit.picture(number)
            fit.see("a", *call(number))
        return fit

    candidates, settings = {"a": [SPEC, PLAIN]}, FitSettings(rows=20, held_out=2)
    whole = run(JointFit(candidates, settings), range(4)).fitted()
    run(JointFit(candidates, settings), range(3)).save(tmp_path / "state")
    again = JointFit(candidates, settings)
    again.restore(tmp_path / "state")
    for own, other in zip(run(again, [3]).fitted()["a"], whole["a"], strict=True):
        assert own.error == other.error
        assert all(torch.equal(a, b) for a, b in zip(own.mixer.parameters(), other.mixer.parameters()))  # noqa: B905


class Model:
    """A joint attention that looks near, and one of noise; pictures of two sizes."""

    see = None

    @contextmanager
    def watched(self, see):
        self.see = see
        yield

    def sample(self, number):
        random, grid = torch.Generator().manual_seed(number), [(12, 16), (24, 32)][number % 4 % 2]
        tokens = TEXT + grid[0] * grid[1]
        for site in ("smooth", "rough"):
            q, k, v = torch.randn(3, 1, HEADS, tokens, WIDTH, generator=random)
            if site == "smooth":
                far = torch.linspace(0, 3, grid[0])[:, None] + torch.linspace(0, 2, grid[1])
                v[:, :, TEXT:] = far.flatten()[:, None].cos()
                k, q = k * 0.1, q * 0.1
            self.see(site, q, k, v, JointLayout(grid, TEXT), None)


@pytest.fixture
def converted(monkeypatch):
    """Joint mixers are twice as fast as attention."""
    asked = []

    def alternate(runs, device, repeats, check=lambda: None):
        asked.append(repeats)
        for run in runs.values():
            run()
        return {name: [0.1 if n == 0 and repeats else 0.05] for n, name in enumerate(runs)}

    monkeypatch.setattr(conversion, "alternate", alternate)
    model = Model()
    specs = {site: joint_candidates(8, HEADS, WIDTH)[:4] for site in ("smooth", "rough")}
    return fit_and_choose(specs, model.watched, model.sample, Wishes(limit=0.1), fitting=JointFit)


def test_a_model_is_converted_where_errors_are_small(converted, tmp_path):
    assert list(converted.mixers) == ["smooth"] and "above 0.1" in converted.kept["rough"]
    assert {layer.grid for layer in converted.layers} == {(24, 32)}
    text = conversion_report.report_text(converted, (512, 384), 4)
    assert "1 of 2 self-attentions are replaced by joint mixers" in text and " landmarks" in text
    checkpoint = converted.checkpoint("flux", ["smooth", "rough"], {"sizes": "12x16, 24x32"})
    save_checkpoint(checkpoint, tmp_path / "joint.safetensors")
    loaded = load_checkpoint(tmp_path / "joint.safetensors")
    assert loaded.mixer == "joint" and list(loaded.kept) == ["rough"]
    assert loaded.blocks["smooth"].spec == checkpoint.blocks["smooth"].spec


def test_a_report_names_joint_mixers_where_none_stands(converted):
    none = replace(converted, layers=[replace(layer, mixer=None) for layer in converted.layers])
    text = conversion_report.report_text(none, (512, 384), 4)
    assert "0 of 2 self-attentions are replaced by joint mixers" in text
