"""The sums that hybrid mixers are fitted from: Gram matrices of features and their products with answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import DeltaConvError
from ..mixers.hybrid import HybridSpec
from ..mixers.hybrid.features import count
from ..mixers.joint import JointSpec


class HybridSums:
    """The sums over one set of queries.

    Attributes:
        gram: (heads or channels, F, F).
        products: (heads or channels, F) of the features with what the start leaves of attention's answer.
        rest: (heads or channels,) squares of what the start leaves.
        answers: (heads or channels,) squares of attention's answer.
    """

    def __init__(self, spec: HybridSpec | JointSpec, device: torch.device) -> None:
        size, shared = count(spec), spec.shared
        self.gram, self.products, self.rest, self.answers = (
            torch.zeros(shape, dtype=torch.float64, device=device)
            for shape in ((shared, size, size), (shared, size), (shared,), (shared,))
        )

    def add(self, x: Tensor, rest: Tensor, answers: Tensor) -> None:
        """Features (heads or channels, n, F), and (heads or channels, n) twice."""
        self.gram += x.mT @ x
        self.products += (x.mT @ rest[..., None])[..., 0]
        self.rest += rest.square().sum(dim=1)
        self.answers += answers.square().sum(dim=1)

    def error(self, change: Tensor) -> float:
        """The relative error of the start plus a change (heads or channels, F) of its parameters; infinite
        where attention answered nothing."""
        bent = (self.gram @ change[..., None])[..., 0]
        squares = self.rest.sum() - 2 * (change * self.products).sum() + (change * bent).sum()
        error = float((squares.clamp(min=0) / self.answers.sum()).sqrt())
        return math.inf if math.isnan(error) else error

    def solve(self, ridge: float) -> Tensor:
        """(heads or channels, F): the change from the start.

        Raises:
            DeltaConvError: there is not one best change, or the sums are not finite.
        """
        if not (self.gram.isfinite().all() and self.products.isfinite().all()):
            raise DeltaConvError(
                "the model's attention computed NaN or infinite numbers, which no mixer can be fitted to; "
                "run the model in bfloat16 or float32"
            )
        size = self.gram.shape[-1]
        scale = self.gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
        eye = torch.eye(size, dtype=self.gram.dtype, device=self.gram.device)
        # Where nothing was seen, nothing is changed.
        added = torch.where(scale > 0, ridge * scale, 1)[:, None, None] * eye
        factor, failed = torch.linalg.cholesky_ex(self.gram + added)
        if failed.any():
            raise DeltaConvError(
                f"the sums of a fit do not have one best solution with a ridge of {ridge:g}; choose a larger "
                "one, show the model more pictures, or remove the state of the fit, if it was damaged"
            )
        return torch.cholesky_solve(self.products[..., None], factor)[..., 0]

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("gram", "products", "rest", "answers")}

    def to(self, device: torch.device) -> None:
        """Moves the sums, which may have come from a file."""
        for name, tensor in self.tensors().items():
            setattr(self, name, tensor.to(device))


def sums_bytes(specs: Sequence[HybridSpec | JointSpec]) -> int:
    """What the sums for these mixers take, whatever the size and number of the pictures."""
    return sum(2 * 8 * spec.shared * (count(spec) ** 2 + count(spec) + 2) for spec in specs)


def named_sums(sums: Mapping[str, Sequence[tuple[HybridSums, HybridSums]]]) -> dict[str, Tensor]:
    """The tensors of sums by the names that they have in a file."""
    return {
        f"{site}/{number}/{which}/{name}": tensor
        for site, candidates in sums.items()
        for number, both in enumerate(candidates)
        for which, one in enumerate(both)
        for name, tensor in one.tensors().items()
    }


def add_queries(
    sums: HybridSums,
    spec: HybridSpec | JointSpec,
    x: Tensor,
    answers: Tensor,
    exact: Tensor | float = 0.0,
) -> None:
    """Features (B, heads, n, F, d) and attention's answers (B, heads, n, d) of some queries.

    Args:
        exact: what the mixer answers whatever its parameters are, in the shape of the answers.
    """
    rest = answers - exact - (x[:, :, :, -1] if spec.landmarks else 0.0)
    if spec.share == "head":
        by = x.permute(1, 0, 2, 4, 3).flatten(1, 3)
        flat = [t.transpose(0, 1).flatten(1) for t in (rest, answers)]
    else:
        by = x.permute(1, 4, 0, 2, 3).flatten(0, 1).flatten(1, 2)
        flat = [t.permute(1, 3, 0, 2).flatten(0, 1).flatten(1) for t in (rest, answers)]
    # Moved first: not all GPUs have float64.
    sums.add(*(t.to(sums.gram.device).double() for t in (by, *flat)))
