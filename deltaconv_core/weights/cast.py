"""A checkpoint in another dtype."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import CheckpointError
from .checkpoint import Checkpoint, assemble_blocks


def cast(checkpoint: Checkpoint, dtype: torch.dtype) -> Checkpoint:
    """A copy of which all weights, those of the base model too, are of this dtype.

    Raises:
        CheckpointError: a number that is too large for it.
    """
    specs = {site: block.spec for site, block in checkpoint.blocks.items()}
    tensors = {
        f"{site}.{name}": _cast(f"{site}.{name}", tensor, dtype)
        for site, block in checkpoint.blocks.items()
        for name, tensor in block.state_dict().items()
    }
    base = {name: _cast(name, tensor, dtype) for name, tensor in checkpoint.base_weights.items()}
    return replace(
        checkpoint,
        blocks=assemble_blocks("", specs, tensors),
        base_weights=base,
        metadata=dict(checkpoint.metadata),
    )


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    if not cast.isfinite().all():
        raise CheckpointError(
            f"{name} has values up to {float(tensor.abs().max()):.3g}, too large for "
            f"{str(dtype).removeprefix('torch.')}; choose bfloat16 or float32"
        )
    return cast
