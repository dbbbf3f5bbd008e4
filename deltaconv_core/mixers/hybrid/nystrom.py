"""Nyström's correction of softmax over landmarks: the inverse of the landmarks' own attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ...util.precision import tf32_allowed

RIDGE = 1e-3  # added to A^T A, whose largest eigenvalue is at least 1
NEWTON_STEPS = 6
MOST_BY_PRODUCTS = 256  # landmarks up to which a GPU solves by products
NEGLIGIBLE = 1e-4  # distance of an inverse's eigenvalues from right; the refinement squares it


def corrected(a: Tensor, m: Tensor, how: str) -> Tensor:
    """A+ M, with as much of the inverse of A as is well determined. No SVD: GPUs are slow at it.

    Args:
        a: (..., P, P) attention of the landmarks to each other; rows sum to 1.
        m: (..., P, d) attention of the landmarks to all tokens.
        how: "cholesky", of A^T A + RIDGE, or "newton", for Newton–Schulz iterations.
    """
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    if how == "cholesky":
        gram, right = a.mT @ a + RIDGE * eye, a.mT @ m
        return solved_by_products(gram, right) if products_are_faster(a) else solved(gram, right)
    columns, rows = (a.abs().sum(dim=dim).amax(dim=-1)[..., None, None] for dim in (-2, -1))
    z = a.mT / (columns * rows)
    for _ in range(NEWTON_STEPS):
        az = a @ z
        z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
    return z @ m


def products_are_faster(a: Tensor) -> bool:
    """Whether `solved_by_products` is the way for such matrices: on GPUs, which factorize slowly."""
    return a.is_cuda and a.shape[-1] <= MOST_BY_PRODUCTS and not tf32_allowed()


def solved(gram: Tensor, right: Tensor) -> Tensor:
    """gram^-1 right by Cholesky factors."""
    if gram.device.type == "mps":  # most versions of PyTorch cannot solve there
        return solved(gram.cpu(), right.cpu()).to(gram.device)
    # Not `cholesky`, which waits for the GPU to see whether it failed; with the ridge it cannot.
    factor, _ = torch.linalg.cholesky_ex(gram)
    return torch.cholesky_solve(right, factor)


def solved_by_products(gram: Tensor, right: Tensor) -> Tensor:
    """The same by products of matrices alone, and as exact but for rounding.

    Newton's iteration x <- c x (2 - gram x) with a gram divided by its norm: if the eigenvalues of gram x are
    in 1 -+ e, with c = 2 / (2 - e^2) they are in 1 -+ e^2 / (2 - e^2) afterwards. So the number of steps
    follows from the bounds (11 for 144 landmarks), and nothing waits for the GPU. What rounding leaves, one
    step of iterative refinement takes away.

    Args:
        gram: (..., P, P), A^T A + RIDGE where the rows of A sum to 1.
        right: (..., P, d).
    """
    size = gram.shape[-1]
    norm = gram.abs().sum(dim=-1).amax(dim=-1)[..., None, None]
    s, b = ((t / norm).flatten(0, -3) for t in (gram, right))
    least = RIDGE / (size + RIDGE)  # eigenvalue of s: a column of A sums to size at most
    distance = (1 - least) / (1 + least)
    x = (2 / (1 + least) * torch.eye(size, dtype=s.dtype, device=s.device)).expand_as(s)
    while distance > NEGLIGIBLE:
        c = 2 / (2 - distance**2)
        x = torch.baddbmm(x, x, s @ x, beta=2 * c, alpha=-c)
        distance = distance**2 / (2 - distance**2)
    y = x @ b
    y = y + x @ (b - s @ y)
    return y.view(right.shape)
