"""How far two results are apart, and whether two sets of weights are the same to the last bit.

Weights are compared bit for bit, and so is what one and the same memory gives twice. What is computed from
two places in memory agrees within `ROUNDING`: the kernels of some processors round differently by where a
weight lies (at 0 or at 8 modulo 16), and one that is mapped from a file may lie at any multiple of 8.
`MKL_ENABLE_INSTRUCTIONS=SSE4_2 pytest ...` shows it on other processors, too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

ROUNDING = 1e-5
"""Between outputs of small networks in float32 that differ in rounding alone; it was up to 3e-7."""


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference as a part of the largest expected value; nan where something is not finite."""
    return float((actual - expected).abs().max() / expected.abs().max())


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """The length of the difference as a part of the expected length, both in float64."""
    expected = expected.detach().double()
    return float((actual.detach().double() - expected).norm() / expected.norm().clamp(min=1e-30))


def same_weights(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether the same names stand for the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
