"""What self-attention and its stand-in cost, counted in floating point operations: two for each multiply-add.

The paper's table 1 counts attention's projections once for each multiply-add, and its two products twice.
"""

from __future__ import annotations

from .spec import BlockSpec


def attention_flops(tokens: int, channels: int) -> int:
    """One self-attention of N tokens: four projections, 8NC², and two products, 4N²C."""
    return 8 * tokens * channels**2 + 4 * tokens**2 * channels


def block_flops(spec: BlockSpec, grid: tuple[int, int]) -> int:
    """One ΔConvBlock, each step done as written: projections, depth-wise convolutions, and the global branch.

    Pooling, gates and interpolation are left out.
    """
    height, width = grid
    stages = sum(max(1, int(height * s)) * max(1, int(width * s)) for s in spec.scales)
    projections = height * width * spec.dim * (spec.inter + spec.merged) + spec.dim**2
    return 2 * (projections + stages * spec.inter * spec.kernel_size**2)
