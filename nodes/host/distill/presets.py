"""Settings for the memory of a graphics card, and the memory they need as far as arithmetic can say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from ....deltaconv_core.distill import Settings
from ....deltaconv_core.distill.job import Job
from ....deltaconv_core.sites.choose_specs import AUTO

CUSTOM = "custom"


@dataclass(frozen=True)
class Preset:
    """The settings that decide memory use.

    Args:
        batch_size: samples that run at once.
        accumulation: batches that make one step.
        precision: as in the core's settings, or "auto".
        optimizer: as in the core's settings, or "auto": 8-bit where bitsandbytes is installed.
        ema: as in the core's settings; 0 saves a copy of the blocks.
    """

    batch_size: int
    accumulation: int
    precision: str
    optimizer: str
    ema: float


PRESETS = {
    "8 GB": Preset(1, 4, AUTO, AUTO, 0.0),
    "12 GB": Preset(1, 4, AUTO, AUTO, 0.995),
    "16 GB": Preset(2, 2, AUTO, "adamw", 0.995),
    "24 GB": Preset(4, 1, AUTO, "adamw", 0.995),
}


def chosen(job: Job, preset: str, device: torch.device) -> Preset:
    """The preset of a name, or the job's own values, with "auto" decided for this machine."""
    own = Preset(**{one.name: getattr(job, one.name) for one in fields(Preset)})
    return settled(PRESETS.get(preset, own), device)


def settled(preset: Preset, device: torch.device) -> Preset:
    """The preset with "auto" decided for this machine."""
    optimizer = preset.optimizer
    if optimizer == AUTO:
        optimizer = "adamw8bit" if _has_8bit(device) else "adamw"
    return replace(preset, precision=precision_for(preset.precision, device), optimizer=optimizer)


def precision_for(precision: str, device: torch.device) -> str:
    """What "auto" means on a device: bf16, fp16 on cards that lack it, fp32 on a CPU."""
    if precision != AUTO:
        return precision
    if comfy.model_management.is_device_cpu(device):
        return "fp32"
    return "bf16" if comfy.model_management.should_use_bf16(device) else "fp16"


def training_bytes(specs: Mapping[str, Any], settings: Settings) -> int:
    """Bytes of the blocks and all that AdamW and the average keep beside each weight.

    Args:
        specs: of the blocks or mixers, by site id.
        settings: of the training.
    """
    weights = sum(spec.num_parameters for spec in specs.values())
    moments = 2 * (1 if settings.optimizer == "adamw8bit" else 4)
    return weights * (4 + 4 + moments + (4 if settings.ema else 0))


def activation_bytes(model: ModelPatcher, shape: list[int], settings: Settings) -> int:
    """A guess at what one batch needs on top: ComfyUI's own for sampling, several times over for gradients.

    Args:
        model: ModelPatcher.
        shape: of a batch of latents.
        settings: without an end-to-end phase no gradient goes through the model; with checkpointing a part of
            the model at a time.
    """
    times = 1 if not settings.output_steps else 2 if settings.checkpointing else 6
    return int(times * model.memory_required(shape))


def _has_8bit(device: torch.device) -> bool:
    return device.type == "cuda" and find_spec("bitsandbytes") is not None
