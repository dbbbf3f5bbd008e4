"""What both hosts do alike around the training: new blocks, the draw of a batch, what is noted of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..block import DeltaConvBlock
from ..block.spec import BlockSpec
from .order import generator
from .warm_start import warm_start


def start_blocks(
    specs: Mapping[str, BlockSpec],
    seed: int,
    device: torch.device,
    attention: Callable[[str], Callable[[Tensor], Tensor]],
) -> dict[str, DeltaConvBlock]:
    """New blocks in float32 on a device, each set to what its attention computes on average.

    Args:
        specs: site id -> spec.
        seed: what the blocks follow from; nobody else's random numbers are used up.
        device: that the network is on.
        attention: site id -> its attention, as `warm_start` calls it.

    Raises:
        DeltaConvError: an attention gives NaN or infinity.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = {site: DeltaConvBlock(spec, dtype=torch.float32) for site, spec in specs.items()}
    for site, block in blocks.items():
        warm_start(block.to(device), attention(site))
    return blocks


def draw(
    seed: int,
    number: int,
    shape: tuple[int, ...],
    levels: int,
    dropout: float,
    *,
    by_batch: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """What is random about a batch, beside the order of the data (`order.Order`).

    Args:
        seed: of the run.
        number: of the batch.
        shape: (B, C, H, W) of its latents.
        levels: how many noise levels there are.
        dropout: part of the captions that are dropped.
        by_batch: drop either all captions of the batch or none.

    Returns:
        Noise (B, C, H, W), and for each sample the number of its noise level (B,) and whether its caption is
        dropped (B,); on the CPU.
    """
    random = generator(seed, "batch", number)
    noise = torch.randn(shape, generator=random)
    level = torch.randint(levels, shape[:1], generator=random)
    dropped = torch.rand(1 if by_batch else shape[0], generator=random) < dropout
    return noise, level, dropped.expand(shape[0])


def notes(
    teacher: str, specs: Mapping[str, Any], batch_size: int, dropout: float, **more: str
) -> dict[str, str]:
    """What must be the same, beside the settings, whenever a run is resumed (`loop.distill`).

    Args:
        teacher: fingerprint of its weights.
        specs: of the blocks or mixers, by site id.
        batch_size, dropout: as the batches are drawn.
        more: what else the host has to compare.
    """
    return {
        "teacher": teacher,
        **more,
        "batch_size": str(batch_size),
        "caption_dropout": str(dropout),
        "blocks": json.dumps({site: spec.to_dict() for site, spec in specs.items()}),
    }


def metadata(
    teacher: str,
    training: Mapping[str, Any],
    data: str,
    source: str,
    notes: Mapping[str, str],
    **more: str,
) -> dict[str, str]:
    """Metadata of the file with the trained blocks.

    Args:
        teacher, data: their names or descriptions.
        training: the settings.
        source: what made the blocks.
        notes: of the run, whose fingerprints are added.
        more: what else there is to say.
    """
    return {
        "teacher": f"{teacher} {notes['teacher']}",
        "training": json.dumps(training),
        **more,
        "data": f"{data}, {notes['data']}",
        "source": source,
    }


def summary(specs: Mapping[str, Any]) -> str:
    """How many blocks, and how large they are."""
    count = sum(spec.num_parameters for spec in specs.values())
    amount = f"{count / 1e6:.3g} M" if count >= 10_000 else f"{count:,}"
    return f"{len(specs)} blocks ({amount} parameters)"


def fingerprint(parts: Iterable[str]) -> str:
    """16 hex digits that differ for other texts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode())
    return digest.hexdigest()[:16]


def first_values(weight: Tensor) -> list[float]:
    """Enough of a weight to tell it from another model's."""
    values: list[float] = weight.flatten()[:8].float().tolist()
    return values
