"""How PyTorch multiplies float32 on GPUs."""

from __future__ import annotations

import torch


def tf32_allowed() -> bool:
    """Whether products of float32 may be computed in tf32, which has 10 bits of mantissa."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return bool(matmul.fp32_precision == "tf32")
    return bool(matmul.allow_tf32)
