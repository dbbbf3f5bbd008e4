"""What a joint mixer and a joint attention cost, counted in floating point operations: two for each
multiply-add."""

from __future__ import annotations

from ..hybrid.cells import Grid, cells_of
from ..hybrid.flops import tile_keys
from .spec import JointSpec


def joint_flops(spec: JointSpec | None, grid: Grid, exact: int, inner: int | None = None) -> int:
    """One call of one picture, between the projections, which both have.

    Args:
        spec: of the mixer; None: of the attention itself.
        grid: (H, W) of the image's tokens.
        exact: tokens of all other kinds, each a query and a key.
        inner: channels of the queries of all heads, where there is no spec.
    """
    image = grid[0] * grid[1]
    if spec is None:
        assert inner is not None
        return 4 * (image + exact) ** 2 * inner
    rows, columns = cells_of(grid, spec.landmarks)
    seen = exact + rows * columns + tile_keys(grid, spec.window)
    total = 4 * exact * (image + exact) * spec.inner + 4 * image * seen * spec.inner
    if spec.kernel_size:
        sizes = (max(1, int(grid[0] * s)) * max(1, int(grid[1] * s)) for s in spec.scales)
        total += 2 * sum(sizes) * spec.kernel_size**2 * spec.inner
    return total
