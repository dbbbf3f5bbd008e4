"""PSNR, SSIM and a map of the differences of two batches of pictures.

Pictures are (N, H, W, 3), RGB in [0, 1], as ComfyUI's IMAGE.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from ..errors import DeltaConvError

WINDOW = 11
"""Side of SSIM's window, in pixels: no picture may be smaller."""

_SIGMA = 1.5
_K1, _K2 = 0.01, 0.03
_LUMA = (0.299, 0.587, 0.114)  # of R, G and B: ITU-R BT.601


def check_alike(first: Tensor, second: Tensor) -> None:
    """Refuses batches that cannot be compared picture by picture.

    Raises:
        DeltaConvError: different numbers of pictures or different sizes, or pictures smaller than `WINDOW`.
    """
    if len(first) != len(second):
        raise DeltaConvError(
            f"the batches have {len(first)} and {len(second)} pictures; give both the same number"
        )
    if first.shape[1:3] != second.shape[1:3]:
        raise DeltaConvError(
            f"the first pictures are {_size(first)}, the second {_size(second)}; give both the same size"
        )
    if min(first.shape[1:3]) < WINDOW:
        raise DeltaConvError(
            f"the pictures are {_size(first)}; SSIM looks at windows of {WINDOW}×{WINDOW} pixels, so take "
            "larger ones"
        )


def _size(pictures: Tensor) -> str:
    return f"{pictures.shape[2]}×{pictures.shape[1]}"


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """(N,) peak signal-to-noise ratios in dB, for a peak of 1; infinite for equal pictures."""
    return -10 * (first.double() - second.double()).square().mean(dim=(1, 2, 3)).log10()


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """(N,) structural similarities of the pictures' luma, at most 1.

    Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural
    similarity", IEEE Transactions on Image Processing 13(4), 2004: equation 13 with the constants of section
    III-C, in the Gaussian window of section III-C, averaged over all places where the window lies inside the
    picture (equation 17). The pictures are taken at their own size; some programs first shrink large ones.

    Raises:
        DeltaConvError: pictures that cannot be compared (`check_alike`).
    """
    check_alike(first, second)
    x, y = _luma(first), _luma(second)
    weights = torch.arange(WINDOW, dtype=torch.float64, device=x.device) - WINDOW // 2
    weights = (-weights.square() / (2 * _SIGMA**2)).exp()
    weights = weights / weights.sum()

    def mean(values: Tensor) -> Tensor:
        return conv2d(conv2d(values, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))

    mean_x, mean_y = mean(x), mean(y)
    variance_x = mean(x * x) - mean_x * mean_x
    variance_y = mean(y * y) - mean_y * mean_y
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = _K1**2, _K2**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
    return similarity.mean(dim=(1, 2, 3))


def _luma(pictures: Tensor) -> Tensor:
    """(N, 1, H, W), in float64: variances are small differences of large numbers."""
    return (pictures[..., :3].double() @ pictures.new_tensor(_LUMA, dtype=torch.float64)).unsqueeze(1)


def difference_map(first: Tensor, second: Tensor, gain: float) -> Tensor:
    """(N, H, W, 3) gray pictures, as bright as the channels differ on average, times `gain`; 1 at most."""
    gray = (first - second).abs().mean(dim=-1, keepdim=True) * gain
    return gray.clamp(max=1).expand(-1, -1, -1, 3).contiguous()
