"""A whole block without autograd: as few launches, and as little Python around them, as it takes."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from ..backend import LayerWeights, Size, SpecLike
from ..by_torch import stage_size
from .depthwise_gate import gate_of_taps, transposed
from .mean import mean_product
from .pool import resize
from .project import project_stages


def mixed_at_once(
    x: Tensor,
    grid: Size,
    spec: SpecLike,
    up: LayerWeights,
    pool: LayerWeights,
    convolutions: Sequence[LayerWeights],
    out: LayerWeights,
) -> Tensor:
    """Tokens x (B, H * W, C) mixed by the weights of a block's layers, all in x's dtype."""
    x = x.contiguous()
    u = F.linear(x, *up).view(len(x), *grid, -1)
    everywhere = mean_product(x, *pool, out[1])
    taps = transposed([weight for weight, _ in convolutions])
    stages: dict[int, Tensor] = {}
    for i in sorted(range(len(taps)), key=spec.scales.__getitem__):  # the largest one last: less memory
        scale = spec.scales[i]
        z = u if scale == 1 else resize.directly(u, *stage_size(grid, scale), False)
        stages[i] = gate_of_taps(z, taps[i], convolutions[i][1], spec.gate)
    del u, z
    in_order = [stages.pop(i) for i in range(len(taps))]
    result: Tensor = project_stages.directly(in_order, out[0], everywhere, *grid, spec.merge == "concat")
    return result
