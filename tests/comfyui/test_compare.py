"""ΔConv Compare: what it gives is what the core measures."""

from __future__ import annotations

import pytest
import torch

from testing.comfy_models import in_pack


@pytest.fixture
def compare(pack):
    node = in_pack(pack, "nodes.compare").Compare
    return lambda *pictures: node.execute(*pictures, "self-attention", "ΔConv")


def test_gives_a_sheet_a_map_and_the_figures(compare, pack):
    first = torch.rand(2, 16, 20, 3, generator=torch.Generator().manual_seed(0))
    second = (first + 0.1).clamp(0, 1)
    sheet, difference, text = compare(first, second).result
    likeness = in_pack(pack, "deltaconv_core.likeness")
    assert sheet.ndim == 4 and sheet.shape[0] == 1 and sheet.shape[3] == 3
    torch.testing.assert_close(difference, likeness.difference_map(first, second, 4))
    noise, similar = likeness.psnr(first, second), likeness.ssim(first, second)
    assert text.splitlines() == [
        f"Mean of 2 pairs: PSNR {noise.mean():.1f} dB, SSIM {similar.mean():.3f}",
        f"1: PSNR {noise[0]:.1f} dB, SSIM {similar[0]:.3f}",
        f"2: PSNR {noise[1]:.1f} dB, SSIM {similar[1]:.3f}",
    ]


def test_says_that_pictures_are_equal(compare):
    same = torch.rand(1, 12, 12, 3)
    assert compare(same, same.clone()).result[2] == "1: PSNR infinite (equal), SSIM 1.000"


def test_transparency_does_not_count(compare):
    first = torch.rand(1, 12, 12, 4)
    second = first.clone()
    second[..., 3] = 1 - first[..., 3]
    assert "equal" in compare(first, second).result[2]


def test_refuses_batches_of_unlike_length(compare, pack):
    with pytest.raises(in_pack(pack, "deltaconv_core.errors").DeltaConvError, match="have 1 and 2 pictures"):
        compare(torch.zeros(1, 12, 12, 3), torch.zeros(2, 12, 12, 3))
