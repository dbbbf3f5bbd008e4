"""Writing blocks as the authors' current code has them; `authors_read.py` reads that back.

Their code fixes what their files do not say, so only blocks that it could have made are written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from torch import Tensor

from ..block import DeltaConvBlock
from ..block.spec import BlockSpec
from ..errors import CheckpointError
from ..sites import identify
from .authors_read import BASE_KEY
from .checkpoint import HEADER_KEY, Checkpoint, check_deltaconv
from .safefile import Pathlike, write_file

SITE = re.compile(r"((?:.+\.)?transformer_blocks\.\d+)\.attn1")
FIXED = {"merge": "concat", "pooling": "average", "depthwise_bias": False, "context": False}
AUTHORS_GATES = ("simple", "sigmoid")


def save_authors(checkpoint: Checkpoint, path: Pathlike) -> None:
    """Writes a checkpoint in the authors' form, gate and scales as texts of the header.

    Raises:
        CheckpointError: what that form cannot hold, by name; or a place that cannot be written.
    """
    check_deltaconv(checkpoint, "the authors' form")
    specs = {site: block.spec for site, block in checkpoint.blocks.items()}
    gate, scales = _common_settings(specs)
    named = identify({site: spec.dim for site, spec in specs.items()})
    if named != checkpoint.architecture:
        raise CheckpointError(
            f"in the authors' form the blocks alone show the architecture; these would be read as {named}, "
            f"not as {checkpoint.architecture}; keep DeltaConv's own"
        )
    tensors: dict[str, Tensor] = {}
    for site, block in checkpoint.blocks.items():
        match = SITE.fullmatch(site)
        if match is None:
            raise CheckpointError(f"the authors' form has no name for the site {site}, only for …attn1")
        tensors |= {f"{match[1]}.conv1.{name}": tensor for name, tensor in _laid_out(block)}
    for name, tensor in checkpoint.base_weights.items():
        if not BASE_KEY.fullmatch(name):
            raise CheckpointError(f"the authors' form has no place for {name}, only for …resnets.<n>.conv1")
        tensors[name] = tensor
    texts = {name: text for name, text in checkpoint.metadata.items() if name != HEADER_KEY}
    write_file(path, tensors, texts | {"gate": gate, "scales": json.dumps(scales), "pooling": "average"})


def _common_settings(specs: dict[str, BlockSpec]) -> tuple[str, tuple[float, ...]]:
    """Gate and scales of all blocks."""
    for site, spec in specs.items():
        wrong = [
            f"{name} {getattr(spec, name)!r} (it has {value!r})"
            for name, value in FIXED.items()
            if getattr(spec, name) != value
        ]
        if spec.gate not in AUTHORS_GATES:
            wrong.append(f"gate {spec.gate!r} (it has {' and '.join(map(repr, AUTHORS_GATES))})")
        if spec.inter != spec.dim // 2:
            wrong.append(f"{spec.inter} inner channels (it has half of the {spec.dim})")
        if wrong:
            raise CheckpointError(
                f"the authors' form cannot hold the block at {site}: {', '.join(wrong)}; keep DeltaConv's own"
            )
    settings = {(spec.gate, spec.scales): site for site, spec in specs.items()}
    if len(settings) != 1:
        kinds = "; ".join(f"{gate} {scales} at {site}" for (gate, scales), site in settings.items())
        raise CheckpointError(
            f"the authors' form has one gate and one set of scales for all blocks, these have "
            f"{kinds or 'none'}; keep DeltaConv's own"
        )
    return next(iter(settings))


def _laid_out(block: DeltaConvBlock) -> Iterable[tuple[str, Tensor]]:
    """Depth-wise kernels as [K, K, channels]."""
    for name, tensor in block.state_dict().items():
        yield name, tensor[:, 0].permute(1, 2, 0) if tensor.ndim == 4 else tensor
