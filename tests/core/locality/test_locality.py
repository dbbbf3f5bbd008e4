"""Locality of synthetic attention whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from deltaconv_core import DeltaConvError
from deltaconv_core.locality import (
    HighPass,
    LayerStatistics,
    attention_maps,
    choose_queries,
    receptive_field,
    statistics,
    window_mass,
)
from testing.attention_maps import gaussian, locality, places, q_and_k, sink, uniform

GRIDS = [(9, 9), (7, 12), (11, 4), (1, 10), (1, 1)]


def random_attention(grid, heads=1, seed=0):
    n = grid[0] * grid[1]
    logits = torch.randn(heads, n, n, generator=torch.Generator().manual_seed(seed)) * 3
    return list(logits.double().softmax(dim=2))


def mass_by_definition(attention, grid, k):
    """ASM(K), word for word: the sum over the window, averaged over the queries."""
    at = places(grid)
    far = (at[:, None] - at[None]).abs().amax(dim=2)
    return float((attention * (far < k / 2)).sum(dim=1).mean())


# ---- attention score mass ----


@pytest.mark.parametrize("grid", GRIDS)
def test_mass_is_the_definition_at_every_kernel_size(grid):
    (attention,) = random_attention(grid)
    mass = locality(grid, attention).mass
    assert len(mass) == max(grid)
    for r, value in enumerate(mass.tolist()):
        assert value == pytest.approx(mass_by_definition(attention, grid, 2 * r + 1), abs=1e-5)
        assert value == pytest.approx(mass_by_definition(attention, grid, 2 * r + 2), abs=1e-5)
    assert mass[-1] == pytest.approx(1, abs=1e-5)


def test_window_mass_of_single_maps():
    maps = torch.arange(12.0).reshape(1, 1, 3, 4)
    mass = window_mass(maps, torch.tensor([2]), torch.tensor([0]))
    assert mass.tolist() == [[[8, 4 + 5 + 8 + 9, 0 + 1 + 2 + 4 + 5 + 6 + 8 + 9 + 10, 66]]]


@pytest.mark.parametrize("width", [0.7, 1.5, 3.0])
def test_mass_of_a_gaussian(width):
    """In the middle of a large picture: the square of the error function."""
    grid = (41, 41)
    attention = gaussian(grid, width)
    middle = attention[20 * 41 + 20].reshape(1, 41, 41).float()
    mass = window_mass(middle, torch.tensor([20]), torch.tensor([20]))[0]
    for r in range(8):
        expected = math.erf((r + 0.5) / (width * math.sqrt(2))) ** 2
        assert mass[r] == pytest.approx(expected, abs=0.01 if width > 2 else 0.06)


def test_heads_are_kept_apart_and_averaged():
    grid = (8, 6)
    result = locality(grid, torch.eye(48).double(), uniform(grid))
    assert result.heads == 2
    assert torch.allclose(result.mass_by_head[0], torch.ones(8).double())
    assert torch.allclose(result.mass_by_head[1], locality(grid, uniform(grid)).mass, atol=1e-6)
    assert torch.allclose(result.mass, result.mass_by_head.mean(dim=0), atol=1e-6)


# ---- the high-frequency part ----


@pytest.mark.parametrize("grid", [(8, 8), (7, 12), (1, 10)])
@pytest.mark.parametrize(("order", "cutoff"), [(2, 2.0), (1, 0.7), (4, 3.0)])
def test_high_pass_is_the_fourier_transform_of_the_mirrored_map(grid, order, cutoff):
    maps = torch.rand(3, *grid, generator=torch.Generator().manual_seed(1)).double()
    mirrored = torch.cat([maps, maps.flip(-1)], dim=-1)
    mirrored = torch.cat([mirrored, mirrored.flip(-2)], dim=-2)
    cycles = [torch.fft.fftfreq(2 * n).double() * n for n in grid]  # per picture, not per mirrored picture
    distance = torch.hypot(cycles[0][:, None], cycles[1][None])
    gain = 1 / (1 + (cutoff / distance.clamp(min=1e-9)) ** (2 * order))
    expected = torch.fft.ifft2(torch.fft.fft2(mirrored) * gain).real[..., : grid[0], : grid[1]]
    assert torch.allclose(HighPass(grid, order, cutoff)(maps.float()).double(), expected, atol=1e-6)


def test_high_pass_halves_what_lies_at_the_cutoff_and_takes_the_mean():
    wave = torch.cos(2 * math.pi * 2 * (torch.arange(32) + 0.5) / 32).expand(32, 32)
    high = HighPass((32, 32), cutoff=2.0)(wave + 5)
    assert torch.allclose(high, wave / 2, atol=1e-5)


def test_a_slope_has_no_edge_at_the_borders():
    slope = torch.linspace(0, 1, 32).expand(32, 32) / 512
    frequency = torch.hypot(*torch.meshgrid(torch.fft.fftfreq(32), torch.fft.fftfreq(32), indexing="ij")) * 32
    periodic = torch.fft.ifft2(torch.fft.fft2(slope) * (frequency**2 / (1 + frequency**2))).real
    high = HighPass((32, 32))(slope)
    assert high.clamp(min=0).sum() < 0.05 * slope.sum() < 0.5 * periodic.clamp(min=0).sum()


@pytest.mark.parametrize("grid", [(24, 24), (9, 16), (1, 12)])
def test_uniform_attention_has_no_high_frequencies(grid):
    result = locality(grid, uniform(grid))
    assert result.high_share < 1e-5
    assert result.erf == result.erf_without_sinks == 1
    assert torch.equal(result.high, torch.ones(max(grid)).double())
    assert result.first == pytest.approx(1 / result.tokens) == pytest.approx(result.last)
    assert (result.components.local, result.components.residual) == (0, 0)
    assert result.components.constant == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("grid", [(24, 24), (13, 20)])
def test_attention_to_oneself(grid):
    result = locality(grid, torch.eye(grid[0] * grid[1]).double())
    assert result.erf == 1
    assert result.high[0] > 0.98
    assert torch.allclose(result.mass, torch.ones(max(grid)).double(), atol=1e-5)


@pytest.mark.parametrize("shift", [(0, 3), (-4, 2), (5, 0)])
def test_shifted_attention_is_found_where_it_is(shift):
    """Nothing near the query, all of it in the window that reaches the shift."""
    grid = (30, 26)
    at = places(grid)
    target = at + torch.tensor(shift)
    target = torch.stack([target[:, 0].clamp(0, 29), target[:, 1].clamp(0, 25)], dim=1)
    attention = torch.eye(780).double()[target[:, 0] * 26 + target[:, 1]]
    result = locality(grid, attention)
    reach = max(map(abs, shift))
    assert result.erf == result.erf_without_sinks == 2 * reach + 1
    peak = int(result.around.argmax())
    assert (peak // 51 - 29, peak % 51 - 25) == shift


@pytest.mark.parametrize("width", [1.0, 2.0, 3.0])
def test_receptive_field_of_a_gaussian(width):
    """80 % of a narrow Gaussian lie within 1.62 widths to each side."""
    grid = (48, 48)
    result = locality(grid, gaussian(grid, width))
    own = receptive_field(result.mass)
    assert own == 2 * math.ceil(1.617 * width - 0.5) + 1
    assert own - 2 <= result.erf <= own  # the filter takes a little of the broad foot
    fit = result.components
    assert (fit.power, fit.length) == (2, pytest.approx(width * math.sqrt(2), rel=0.06))
    assert fit.local > 0.96 and fit.residual < 1e-3


def test_a_background_changes_the_mass_but_not_the_receptive_field():
    grid = (32, 32)
    local = locality(grid, gaussian(grid, 1.0))
    mixed = locality(grid, 0.3 * gaussian(grid, 1.0) + 0.7 * uniform(grid))
    assert mixed.mass[2] == pytest.approx(0.3 * local.mass[2].item(), abs=0.02)
    assert mixed.erf == local.erf
    assert mixed.high_share == pytest.approx(0.3 * local.high_share, rel=0.01)
    assert mixed.components.local == pytest.approx(0.3, abs=0.01)
    assert mixed.components.constant == pytest.approx(0.7, abs=0.01)


def test_exponential_decay_is_told_from_a_gaussian():
    grid = (32, 32)
    at = places(grid).double()
    distance = (at[:, None] - at[None]).square().sum(dim=2).sqrt()
    fit = locality(grid, (-distance / 2).softmax(dim=1)).components
    assert (fit.power, fit.length) == (1, pytest.approx(2, rel=0.06))
    assert fit.residual < 0.005


def test_a_residual_where_neither_component_fits():
    grid = (24, 24)
    fit = locality(grid, gaussian(grid, 1.0, shift=(0, 8))).components
    assert fit.residual > 0.9


@pytest.mark.parametrize(("token", "name"), [(0, "first"), (-1, "last")])
def test_sinks_are_counted_and_can_be_left_out(token, name):
    grid = (20, 17)
    result = locality(grid, 0.6 * gaussian(grid, 0.8) + 0.4 * sink(grid, token))
    assert getattr(result, name) == pytest.approx(0.4, abs=0.01)
    assert getattr(result, {"first": "last", "last": "first"}[name]) < 0.01
    assert result.erf > 15
    assert result.erf_without_sinks == locality(grid, gaussian(grid, 0.8)).erf


def test_what_the_corners_attend_to_in_themselves_is_no_sink():
    grid = (12, 12)
    result = locality(grid, torch.eye(144).double())
    assert torch.allclose(result.high, result.high_without_sinks, atol=1e-4)


# ---- joint attention ----


def test_the_image_part_of_joint_attention():
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 5 + 12, 8), torch.randn(2, 3, 5 + 12, 8)
    image = slice(5, 17)
    maps, outside = attention_maps(q[:, :, image], k, image)
    whole = (q @ k.transpose(-1, -2) / 8**0.5).softmax(dim=-1)[:, :, image]
    assert torch.allclose(outside, whole[..., :5].sum(dim=-1), atol=1e-6)
    assert torch.allclose(maps, whole[..., image] / whole[..., image].sum(dim=-1, keepdim=True), atol=1e-6)
    layer = LayerStatistics("site", 24)
    layer.add(q, k, (3, 4), image=image)
    assert layer.result().outside == pytest.approx(outside.mean().item(), abs=1e-6)


@pytest.mark.parametrize("kind", ["bool", "added", "by query"])
def test_masks(kind):
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8)
    seen = torch.rand(1, 1, 12 if kind == "by query" else 1, 12) > 0.4
    seen[..., 0] = True
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, -1e4)
    image = slice(2, 12)
    layer = LayerStatistics("site", 16)
    layer.add(q, k, (2, 5), image=image, mask=mask)
    logits = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~seen, -torch.inf)[:, :, image]
    expected = 1 - logits.softmax(dim=-1)[..., image].sum(dim=-1).mean()
    assert layer.result().outside == pytest.approx(expected.item(), abs=1e-5)
    maps = logits[..., image].softmax(dim=-1).mean(dim=1)[0].double()
    assert layer.result().mass[0] == pytest.approx(mass_by_definition(maps, (2, 5), 1), abs=1e-5)


# ---- gathering ----


def test_chunks_calls_and_batches_do_not_matter(monkeypatch):
    grid = (6, 9)
    attention = random_attention(grid, heads=4)
    whole = locality(grid, *attention)
    monkeypatch.setattr(statistics, "MAP_BYTES", 4 * 7 * 54 * 4)
    assert_same(locality(grid, *attention), whole)
    q, k = q_and_k(*attention)
    layer = LayerStatistics("site", 64)
    layer.add(q.expand(2, -1, -1, -1), k.expand(2, -1, -1, -1), grid, moment="early")
    layer.add(q, k, grid, moment="late")
    assert_same(layer.result(), whole)
    assert list(layer.result().by_moment) == ["early", "late"]


def assert_same(result, expected):
    for name in ("mass", "mass_by_head", "high", "high_without_sinks", "around"):
        assert torch.allclose(getattr(result, name), getattr(expected, name), atol=1e-5), name
    assert result.high_share == pytest.approx(expected.high_share, abs=1e-6)


def test_timesteps_are_averaged_and_told_apart():
    grid = (16, 16)
    layer = LayerStatistics("site", 64)
    layer.add(*q_and_k(torch.eye(256).double()), grid, moment="1")
    layer.add(*q_and_k(gaussian(grid, 1.0, shift=(0, 5))), grid, moment="2")
    result = layer.result()
    assert result.erf_range[0] == 1 and result.erf_range[1] >= 11
    assert result.mass[0] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(dtype):
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 30, 8).to(dtype), torch.randn(1, 2, 30, 8).to(dtype)
    half, full = LayerStatistics("site", 16), LayerStatistics("site", 16)
    half.add(q, k, (5, 6))
    full.add(q.float(), k.float(), (5, 6))
    assert torch.equal(half.result().mass, full.result().mass)


class OnDevice(torch.Tensor):
    """On a device without float64, such as Apple's MPS; what is computed from it stays there."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs)
        if func is torch.Tensor.cpu:
            return out.as_subclass(torch.Tensor)
        assert getattr(out, "dtype", None) != torch.float64, f"float64 on the device: {func.__name__}"
        return out


def test_a_device_without_float64(monkeypatch):
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, **more: zeros(*size, **more).as_subclass(OnDevice))
    grid = (4, 6)
    (attention,) = random_attention(grid)
    layer = LayerStatistics("site", 64)
    layer.add(*(t.as_subclass(OnDevice) for t in q_and_k(attention)), grid)
    monkeypatch.undo()
    assert_same(layer.result(), locality(grid, attention))


def test_the_result_can_be_stopped():
    def stop():
        raise KeyboardInterrupt

    layer = LayerStatistics("site", 64)
    layer.add(*q_and_k(uniform((2, 3))), (2, 3))
    layer.check = stop
    with pytest.raises(KeyboardInterrupt):
        layer.result()


def test_few_tokens_are_all_looked_at_and_many_are_sampled():
    assert choose_queries(100).tolist() == list(range(100))
    assert len(choose_queries(16_384)) == 16_384
    chosen = choose_queries(16_385)
    assert len(chosen) == len(set(chosen.tolist())) == 1024 and chosen.tolist() == sorted(chosen.tolist())
    assert not torch.equal(chosen, choose_queries(16_385, seed=1))


@pytest.mark.parametrize(("batch", "calls"), [(1, 1), (3, 1), (1, 3)])
def test_the_error_of_a_sample_is_the_one_stated(batch, calls):
    """Over many draws, the deviation from the exact answer is as large as the standard error says; pictures
    that the same queries look at, in one call or in several at one timestep, make it no smaller."""
    grid = (12, 15)
    widths = torch.linspace(0.5, 4, 180).double()
    attention = torch.stack([gaussian(grid, float(w))[i] for i, w in enumerate(widths)])
    exact = locality(grid, attention)
    assert exact.exact and not exact.mass_error.any() and not exact.high_error.any()
    q, k = (t.expand(batch, -1, -1, -1) for t in q_and_k(attention))

    def sampled(seed):
        layer = LayerStatistics("site", 64, exact_limit=1, sample=60, seed=seed)
        for _ in range(calls):
            layer.add(q, k, grid, moment="1/1")
        return layer.result()

    draws = [sampled(seed) for seed in range(60)]
    assert all(draw.queries == 60 and not draw.exact for draw in draws)
    for curve, error in (("mass", "mass_error"), ("high", "high_error")):
        for r in (0, 2, 5):
            off = torch.stack([(getattr(draw, curve) - getattr(exact, curve))[r] for draw in draws])
            stated = torch.stack([getattr(draw, error)[r] for draw in draws]).mean()
            assert off.square().mean().sqrt() == pytest.approx(stated.item(), rel=0.35)


def test_refuses_tokens_that_do_not_fit():
    layer = LayerStatistics("mid_block.attn1", 64)
    q = torch.zeros(1, 1, 12, 4)
    with pytest.raises(DeltaConvError, match=r"mid_block.attn1: expected 3 x 5 = 15 tokens.*got 12 queries"):
        layer.add(q, q, (3, 5))
    with pytest.raises(DeltaConvError, match=r"12 queries and 13 keys"):
        layer.add(q, torch.zeros(1, 1, 13, 4), (3, 4))
    layer.add(q, q, (3, 4))
    with pytest.raises(DeltaConvError, match=r"was 3 x 4 and is now 4 x 3"):
        layer.add(q, q, (4, 3))
    with pytest.raises(DeltaConvError, match="other was never called|at other was never"):
        LayerStatistics("other", 64).result()


def test_refuses_attention_that_is_not_a_number():
    layer = LayerStatistics("mid_block.attn1", 64)
    q = torch.zeros(1, 1, 12, 4)
    q[0, 0, 5, 2] = torch.nan
    layer.add(q, torch.zeros(1, 1, 12, 4), (3, 4))
    with pytest.raises(DeltaConvError, match="attention at mid_block.attn1 holds NaN.*float32"):
        layer.result()


def test_can_be_stopped_between_chunks(monkeypatch):
    monkeypatch.setattr(statistics, "MAP_BYTES", 1)
    calls = []

    def check():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    layer = LayerStatistics("site", 64, check=check)
    with pytest.raises(KeyboardInterrupt):
        layer.add(*q_and_k(uniform((3, 3))), (3, 3))
    assert len(calls) == 3
