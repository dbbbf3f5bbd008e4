"""PSNR, SSIM and the difference map, against formulas written out and values found by hand."""

from __future__ import annotations

import math

import pytest
import torch

from deltaconv_core import DeltaConvError
from deltaconv_core.likeness import difference_map, psnr, ssim


@pytest.fixture
def pictures():
    return torch.rand(3, 14, 17, 3, generator=torch.Generator().manual_seed(0))


def noisy(pictures, amount):
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1))
    return (pictures + amount * noise).clamp(0, 1)


def slow_ssim(first, second):
    """Equations 13 to 17 of Wang et al. 2004, window by window."""
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    x, y = first.double() @ luma, second.double() @ luma
    weights = [
        [math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)] for i in range(11)
    ]
    w = torch.tensor(weights, dtype=torch.float64)
    w = w / w.sum()
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = (plane[top : top + 11, left : left + 11] for plane in (x, y))
            mean_a, mean_b = (w * a).sum(), (w * b).sum()
            var_a, var_b = (w * (a - mean_a) ** 2).sum(), (w * (b - mean_b) ** 2).sum()
            both = (w * (a - mean_a) * (b - mean_b)).sum()
            above = (2 * mean_a * mean_b + 1e-4) * (2 * both + 9e-4)
            below = (mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4)
            values.append(above / below)
    return torch.stack(values).mean()


def test_ssim_is_the_papers_window_by_window(pictures):
    other = noisy(pictures, 0.2)
    expected = torch.stack([slow_ssim(a, b) for a, b in zip(pictures, other, strict=True)])
    torch.testing.assert_close(ssim(pictures, other), expected, rtol=1e-10, atol=0)


def test_ssim_of_two_even_pictures_is_that_of_their_means():
    dark, light = torch.full((1, 11, 11, 3), 0.2), torch.full((1, 11, 11, 3), 0.6)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert ssim(dark, light).item() == pytest.approx(expected, rel=1e-6)


def test_equal_pictures_are_as_alike_as_can_be(pictures):
    assert psnr(pictures, pictures).tolist() == [math.inf] * 3
    torch.testing.assert_close(ssim(pictures, pictures), torch.ones(3, dtype=torch.float64))
    assert difference_map(pictures, pictures, 4).abs().max() == 0


def test_the_noisier_the_less_alike(pictures):
    for measure in (psnr, ssim):
        values = torch.stack([measure(pictures, noisy(pictures, amount)) for amount in (0.01, 0.1, 0.5)])
        assert (values.diff(dim=0) < 0).all()


def test_psnr_by_hand():
    assert psnr(torch.zeros(1, 12, 12, 3), torch.full((1, 12, 12, 3), 0.1)).item() == pytest.approx(20)


def test_a_difference_is_as_bright_as_the_channels_differ_on_average():
    first = torch.zeros(1, 11, 11, 3)
    second = first.clone()
    second[0, 2, 3] = torch.tensor([0.3, 0.0, 0.0])
    second[0, 4, 5] = 1.0
    seen = difference_map(first, second, gain=4)
    assert seen.shape == first.shape
    torch.testing.assert_close(seen[0, 2, 3], torch.full((3,), 0.4))
    assert seen[0, 4, 5].tolist() == [1, 1, 1]
    assert seen.count_nonzero() == 6


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ((2, 12, 12, 3), (3, 12, 12, 3), "the batches have 2 and 3 pictures"),
        ((2, 12, 16, 3), (2, 12, 12, 3), "the first pictures are 16×12, the second 12×12"),
        ((2, 10, 12, 3), (2, 10, 12, 3), "the pictures are 12×10"),
    ],
)
def test_what_cannot_be_compared_is_refused(first, second, message):
    with pytest.raises(DeltaConvError, match=message):
        ssim(torch.zeros(first), torch.zeros(second))
