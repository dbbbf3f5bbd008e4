"""What self-attention and its stand-in cost, counted in floating point operations: two for each multiply-add.

The paper's table 1 counts attention's projections once for each multiply-add, and its two products twice.
"""

from __future__ import annotations

from .spec import BlockSpec


def attention_flops(tokens: int, channels: int) -> int:
    """One self-attention of N tokens: four projections, 8NC², and two products, 4N²C."""
    return 8 * tokens * channels**2 + 4 * tokens**2 * channels


def block_flops(spec: BlockSpec, grid: tuple[int, int], early: bool = False) -> int:
    """One ΔConvBlock: projections, depth-wise convolutions, and the global branch.

    Pooling, gates and interpolation are left out.

    Args:
        spec: what the block is made of.
        grid: (H, W) of the tokens.
        early: whether smaller stages are projected before they are enlarged, as `ops.plain` does in
            inference; otherwise each step is counted as written. Both are exact.
    """
    height, width = grid
    sizes = [max(1, int(height * s)) * max(1, int(width * s)) for s in spec.scales]
    convolutions = sum(sizes) * spec.inter * spec.kernel_size**2
    if early and spec.merge == "concat":
        enter = (sum(sizes) + spec.context * height * width) * spec.inter // 2
    else:
        enter = height * width * spec.merged
    projections = spec.dim * (height * width * spec.inter + enter + spec.dim)
    return 2 * (projections + convolutions)
