"""Trained blocks as they are to be saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ....deltaconv_core.errors import DeltaConvError
from ....deltaconv_core.weights.checkpoint import Checkpoint, assemble_blocks

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def prepared(checkpoint: Any, dtype: str, texts: Mapping[str, str], keep_base_weights: bool) -> Checkpoint:
    """A copy of a checkpoint with numbers of another dtype and more texts.

    Args:
        checkpoint: trained blocks (`deltaconv_core.Checkpoint`).
        dtype: a key of `DTYPES`.
        texts: go into the metadata, but for empty ones.
        keep_base_weights: whether weights of the base model stay with the blocks.

    Raises:
        DeltaConvError: an unknown dtype, or a number that is too large for it.
    """
    if dtype not in DTYPES:
        raise DeltaConvError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    tensors = {
        f"{id}.{name}": _cast(f"{id}.{name}", tensor, dtype)
        for id, block in checkpoint.blocks.items()
        for name, tensor in block.state_dict().items()
    }
    blocks = assemble_blocks("", {id: block.spec for id, block in checkpoint.blocks.items()}, tensors)
    base = checkpoint.base_weights if keep_base_weights else {}
    metadata = checkpoint.metadata | {key: text.strip() for key, text in texts.items() if text.strip()}
    base = {name: _cast(name, tensor, dtype) for name, tensor in base.items()}
    return Checkpoint(checkpoint.architecture, blocks, base, metadata, checkpoint.kept)


def _cast(name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    cast = tensor.to(DTYPES[dtype])
    if not cast.isfinite().all():
        raise DeltaConvError(
            f"{name} has values up to {float(tensor.abs().max()):.3g}, too large for {dtype}; save as "
            "bf16 or fp32"
        )
    return cast
