"""Nyström's correction of softmax over landmarks: the inverse of the landmarks' own attention."""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-3  # added to A^T A, whose largest eigenvalue is at least 1
NEWTON_STEPS = 6


def corrected(a: Tensor, m: Tensor, how: str) -> Tensor:
    """A+ M, with as much of the inverse of A as is well determined. No SVD: GPUs are slow at it.

    Args:
        a: (..., P, P) attention of the landmarks to each other; rows sum to 1.
        m: (..., P, d) attention of the landmarks to all tokens.
        how: "cholesky", of A^T A + RIDGE, or "newton", for Newton–Schulz iterations.
    """
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    if how == "cholesky":
        transposed = a.mT
        # Not `cholesky`, which waits for the GPU to see whether it failed; with the ridge it cannot.
        factor, _ = torch.linalg.cholesky_ex(transposed @ a + RIDGE * eye)
        return torch.cholesky_solve(transposed @ m, factor)
    columns, rows = (a.abs().sum(dim=dim).amax(dim=-1)[..., None, None] for dim in (-2, -1))
    z = a.mT / (columns * rows)
    for _ in range(NEWTON_STEPS):
        az = a @ z
        z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
    return z @ m
