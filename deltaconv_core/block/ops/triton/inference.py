"""A whole block without autograd: as few launches, and as little Python around them, as it takes."""

import logging
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backend import LayerWeights, Size, SpecLike
from ..by_torch import stage_size
from .depthwise_gate import gate_of_taps, transposed
from .launch import LaunchedKernel, launched_by_triton, recording
from .mean import mean_product
from .pool import resize
from .project import AT_ONCE, float32_products, project_stages
from .tape import Tape, taped

MOST_ENTRIES = 2**25  # of the tokens that a tape is played for; with more, memory counts and not Python
MOST_TAPES = 256

log = logging.getLogger(__name__)
tapes: dict[Hashable, Tape | None] = {}
"""By what they depend on; None: launch by launch."""


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
    u = F.linear(x, *up)
    inputs = [x, u]
    for weight, bias in (pool, *convolutions, out):
        inputs.append(weight)
        if bias is not None:
            inputs.append(bias)
    if x.numel() > MOST_ENTRIES or not all(tensor.is_contiguous() for tensor in inputs):
        return _mixed(x, u, grid, spec, pool, convolutions, out)
    key = (
        x.shape, x.dtype, x.device, grid, spec.scales, spec.gate, spec.merge, convolutions[0][0].shape,
        pool[1] is None, convolutions[0][1] is None, out[1] is None,
        float32_products() if x.dtype == torch.float32 else "", LaunchedKernel.forgotten,
    )  # fmt: skip
    if key in tapes:
        tape = tapes[key]
        y = None if tape is None else tape.played(inputs, x.shape)
        return _mixed(x, u, grid, spec, pool, convolutions, out) if y is None else y
    with recording() as recorded:
        y = _mixed(x, u, grid, spec, pool, convolutions, out)
    few = sum(scale != 1 for scale in spec.scales) <= AT_ONCE  # PyTorch adds the others
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    tape = taped(recorded, inputs, y) if few and not capturing else None
    again = None if tape is None else tape.played(inputs, x.shape)
    if again is None:
        return y
    with launched_by_triton():
        truth = _mixed(x, u, grid, spec, pool, convolutions, out)
    if len(tapes) >= MOST_TAPES:
        tapes.clear()
    tapes[key] = tape
    if not is_right(again, truth):
        tapes.update(dict.fromkeys(tapes))
        LaunchedKernel.trusted = False
        log.warning(
            "ΔConv: direct launches of Triton's kernels gave another result than triton's own, for tokens of "
            "shape %s in %s; triton launches them from now on, which takes a processor longer",
            tuple(x.shape),
            x.dtype,
        )
    return truth


def is_right(y: Tensor, truth: Tensor) -> bool:
    """Whether the bits are the same, asked once for each tape; True where no GPU computed anything."""
    return not y.is_cuda or same_bits(y, truth)


def same_bits(y: Tensor, truth: Tensor) -> bool:
    """Also those of numbers that are not."""
    return torch.equal(y.view(torch.uint8), truth.view(torch.uint8))


def _mixed(
    x: Tensor,
    u: Tensor,
    grid: Size,
    spec: SpecLike,
    pool: LayerWeights,
    convolutions: Sequence[LayerWeights],
    out: LayerWeights,
) -> Tensor:
    """The same, launch by launch; u (B, H * W, c) contiguous."""
    u = u.view(len(x), *grid, -1)
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
