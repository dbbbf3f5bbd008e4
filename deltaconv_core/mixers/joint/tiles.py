"""A kernel for each head, over pictures of many channels, as products of matrices: for tensor cores.

All channels of a head share a kernel, so what it does to a tile of the picture is one matrix for all of them,
from the pixels of the tile and those around it to the pixels of the tile. Most of its entries are zero; a GPU
multiplies by them faster than it does without.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

TILE_SIDE = 16  # pixels along each side of a tile
ENTRIES = 2**27
"""About how many numbers of tiles with what is around them exist at a time: 256 MiB in half precision."""


def tiled_convolution(image: Tensor, kernels: Tensor) -> Tensor:
    """K x K cross-correlation with zeros around, the same for all channels of a head.

    Args:
        image: (B, heads, H, W, d); any strides.
        kernels: (heads, K, K), K odd; moved and cast to what the image is.

    Returns:
        (B, heads, H, W, d).
    """
    batch, heads, height, width, d = image.shape
    size = kernels.shape[-1]
    together = max(1, int(ENTRIES * (TILE_SIDE / (TILE_SIDE + size)) ** 2) // (batch * height * width * d))
    if together < heads:
        some = [slice(first, first + together) for first in range(0, heads, together)]
        return torch.cat([tiled_convolution(image[:, s], kernels[s]) for s in some], dim=1)
    radius, around = size // 2, TILE_SIDE + size - 1
    rows, columns = -(-height // TILE_SIDE), -(-width // TILE_SIDE)
    right, below = columns * TILE_SIDE - width + radius, rows * TILE_SIDE - height + radius
    padded = F.pad(image, (0, 0, radius, right, radius, below))
    # (B, heads, rows, columns, d, around, around)
    parts = padded.unfold(2, around, TILE_SIDE).unfold(3, around, TILE_SIDE)
    # One product for each head, of all its tiles and channels at once.
    parts = parts.permute(1, 5, 6, 0, 2, 3, 4).reshape(heads, around**2, -1)
    y = _matrices(kernels.to(image.device, image.dtype)) @ parts
    y = y.reshape(heads, TILE_SIDE, TILE_SIDE, batch, rows, columns, d).permute(3, 0, 4, 1, 5, 2, 6)
    return y.reshape(batch, heads, rows * TILE_SIDE, columns * TILE_SIDE, d)[:, :, :height, :width]


def _matrices(kernels: Tensor) -> Tensor:
    """(heads, TILE_SIDE², (TILE_SIDE + K - 1)²): what each pixel of a tile takes of each around it."""
    size = kernels.shape[-1]
    around = torch.arange(TILE_SIDE + size - 1, device=kernels.device)
    offset = around - torch.arange(TILE_SIDE, device=kernels.device)[:, None]  # (TILE_SIDE, around)
    inside = (offset >= 0) & (offset < size)
    offset = offset.clamp(0, size - 1)
    # (TILE_SIDE, TILE_SIDE, around, around): rows and columns of the pixel, then of what it sees
    taken = kernels[:, offset[:, None, :, None], offset[None, :, None, :]]
    both = inside[:, None, :, None] & inside[None, :, None, :]
    return (taken * both).reshape(len(kernels), TILE_SIDE**2, -1)
