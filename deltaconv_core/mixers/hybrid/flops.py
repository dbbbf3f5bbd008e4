"""What a hybrid mixer costs, counted in floating point operations: two for each multiply-add."""

from __future__ import annotations

from .cells import Grid, cells_of
from .nystrom import NEWTON_STEPS
from .spec import HybridSpec
from .windowed import tile_side


def hybrid_flops(spec: HybridSpec, grid: Grid) -> int:
    """One layer of a picture: the attention's four projections, and the mixer between them.

    Sums, softmax and interpolation are left out, as in `block.flops`.

    Args:
        spec: what the mixer is made of.
        grid: (H, W) of the tokens.
    """
    tokens, inner = grid[0] * grid[1], spec.inner
    total = 8 * tokens * spec.dim * inner
    if spec.landmarks:
        rows, columns = cells_of(grid, spec.landmarks)
        cells = rows * columns
        seen = cells + (tile_keys(grid, spec.window) if cells < tokens else 0)
        total += 4 * tokens * seen * inner
        if spec.nystrom != "none" and cells < tokens:
            products = 1 + 4 * NEWTON_STEPS if spec.nystrom == "newton" else 2
            total += (
                4 * tokens * cells * inner + 2 * cells**2 * inner * 2 + 2 * products * spec.heads * cells**3
            )
    if spec.kernel_size:
        sizes = (max(1, int(grid[0] * s)) * max(1, int(grid[1] * s)) for s in spec.scales)
        total += 2 * sum(sizes) * spec.kernel_size**2 * inner
    return total


def tile_keys(grid: Grid, window: int) -> int:
    """What all queries of a tile see of the picture, behind a mask; 0 without a window."""
    high, wide = (min(side, tile_side(side) + window - 1) for side in grid)
    return high * wide if window else 0
