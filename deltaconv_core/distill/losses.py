"""The paper's losses (arXiv 2504.21292, section 4.3), each term apart.

    L_f = sum over layers of || Delta^l(z) - attention^l(z) ||^2
    L_z = w(t) * ( || eps_teacher - eps_student ||^2 + || eps - eps_student ||^2 ),  w: Min-SNR, gamma = 5
    L   = L_z + beta * L_f,  beta = 0.001

As in the authors' code, ||.||^2 is the mean over elements. Everything is computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import DeltaConvError

GAMMA = 5.0
BETA = 0.001


def min_snr_weight(snr: Tensor, prediction: str = "epsilon", gamma: float = GAMMA) -> Tensor:
    """Min-SNR weight of a squared error (Hang et al. 2023, arXiv 2303.09556, section 3.4).

    Args:
        snr: (B,) signal-to-noise ratio alpha² / sigma² of each sample, positive.
        prediction: what the network predicts: "epsilon" min(SNR, gamma) / SNR | "v"
            min(SNR, gamma) / (SNR + 1).
        gamma: the ratio above which the weight falls.

    Returns:
        (B,) float32.

    Raises:
        DeltaConvError: an unknown prediction.
    """
    snr = snr.float()
    if prediction == "epsilon":
        return (gamma / snr).clamp(max=1.0)
    if prediction == "v":
        return snr.clamp(max=gamma) / (snr + 1)
    raise DeltaConvError(f"expected prediction 'epsilon' or 'v', got {prediction!r}")


def output_losses(student: Tensor, teacher: Tensor, target: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """The two terms of L_z as scalars: "teacher" (against the teacher's output), "noise" (against the truth).

    Args:
        student, teacher: (B, ...) outputs of the network in its two modes.
        target: (B, ...) what the network is trained to predict: the noise, or v.
        weight: (B,) of each sample, see `min_snr_weight`.
    """
    return {"teacher": _weighted(student, teacher, weight), "noise": _weighted(student, target, weight)}


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference as a scalar, in float32: one layer's term of L_f."""
    return (a.float() - b.float()).square().mean()


def total(errors: Iterable[Tensor]) -> Tensor:
    """L_f as a scalar: the sum of the layers' terms, which a large model may hold on several devices."""
    errors = list(errors)
    return torch.stack([error.to(errors[0].device) for error in errors]).sum()


def _weighted(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    error = (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
    return (weight.float() * error).mean()
