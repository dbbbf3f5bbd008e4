"""The high-frequency part of attention maps: Fourier transform, Butterworth high-pass, and back.

The gain at a distance of D cycles per picture (both axes in periods over the picture's side) is

    G(D) = 1 / (1 + (cutoff / D)^(2 order)),    G(0) = 0

with order 1 and a cut-off of 1 cycle per picture: what varies over the whole picture counts as the broad
part. The paper names the filter, not its parameters. A higher order leaves positive rings around a sharp
peak, which would count as attention that is not there; order 1 leaves none. Maps are mirrored at their
borders, as a discrete cosine transform does: periodic continuation would take a difference between opposite
borders for an edge.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ORDER = 1
CUTOFF = 1.0


class HighPass:
    """The filter for maps of one size.

    Args:
        grid: (H, W).
        order: of the Butterworth filter.
        cutoff: where the gain is one half, in cycles per picture.
        device: of the maps.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        order: int = ORDER,
        cutoff: float = CUTOFF,
        device: torch.device | str | None = None,
    ) -> None:
        height, width = grid
        self._down = cosine_transform(height).to(device)
        self._across = cosine_transform(width).to(device)
        # The k-th cosine has k half periods over the picture.
        y, x = torch.arange(height) / 2, torch.arange(width) / 2
        distance = torch.hypot(y[:, None], x[None, :]).clamp(min=1e-9)
        self._gain = (1 / (1 + (cutoff / distance) ** (2 * order))).to(device)

    def __call__(self, maps: Tensor) -> Tensor:
        """The filtered maps, (..., H, W) float32; the sum of each is zero."""
        spectrum = self._down @ maps @ self._across.T * self._gain
        return self._down.T @ spectrum @ self._across


def cosine_transform(size: int) -> Tensor:
    """The orthogonal matrix of the discrete cosine transform (DCT-II), (size, size) float32."""
    n = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * n[:, None] * (n[None, :] + 0.5)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.float()
