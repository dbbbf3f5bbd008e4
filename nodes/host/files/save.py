"""Trained blocks as they are to be saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ....deltaconv_core.errors import DeltaConvError
from ....deltaconv_core.util.devices import SHORT_DTYPES
from ....deltaconv_core.weights.cast import cast
from ....deltaconv_core.weights.checkpoint import Checkpoint


def prepared(
    checkpoint: Checkpoint, dtype: str, texts: Mapping[str, str], keep_base_weights: bool
) -> Checkpoint:
    """A copy of a checkpoint with numbers of another dtype and more texts.

    Args:
        checkpoint: trained blocks (`deltaconv_core.Checkpoint`).
        dtype: a key of `SHORT_DTYPES`.
        texts: go into the metadata, but for empty ones.
        keep_base_weights: whether weights of the base model stay with the blocks.

    Raises:
        DeltaConvError: an unknown dtype, or a number that is too large for it.
    """
    if dtype not in SHORT_DTYPES:
        raise DeltaConvError(f"dtype must be one of {', '.join(SHORT_DTYPES)}, got {dtype!r}")
    if not keep_base_weights:
        checkpoint = replace(checkpoint, base_weights={})
    checkpoint = cast(checkpoint, SHORT_DTYPES[dtype])
    checkpoint.metadata |= {key: text.strip() for key, text in texts.items() if text.strip()}
    return checkpoint
