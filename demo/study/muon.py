"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) for linear and convolution weights.

The momentum of a weight, taken as a matrix of (outputs, inputs x kernel), is replaced by the nearest matrix
with orthonormal rows or columns, so that every direction of the weight learns at the same rate. The step is
scaled to the size that AdamW's steps have (Liu et al. 2025, arXiv 2502.16982, equation 4), so that one
learning rate serves both.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

#: Coefficients of the polynomial that Jordan et al. iterate.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrix: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """``matrix`` (..., M, N) with its singular values brought near one (to between 0.7 and 1.2), same
    vectors."""
    rows, columns = matrix.shape[-2:]
    wide = matrix if rows <= columns else matrix.mT
    wide = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = wide @ wide.mT
        wide = _A * wide + (_B * gram + _C * gram @ gram) @ wide
    return wide if rows <= columns else wide.mT


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum for parameters of two or more dimensions."""

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                alike.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in alike.items():
                ahead = torch.stack([self._ahead(parameter, group["momentum"]) for parameter in parameters])
                scale = 0.2 * max(ahead.shape[1:]) ** 0.5
                changes = orthogonalize(ahead).unflatten(2, shape[1:])
                torch._foreach_sub_(parameters, list(changes.unbind()), alpha=group["lr"] * scale)

    def _ahead(self, parameter: torch.nn.Parameter, momentum: float) -> torch.Tensor:
        """Nesterov's momentum of a parameter as a matrix."""
        state, gradient = self.state[parameter], parameter.grad
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum"], momentum).flatten(1)
