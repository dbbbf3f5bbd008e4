"""Latents and captions as ComfyUI's dataset nodes hand them over, and the batches made of them.

Everything random about a batch (data order, noise, noise level, dropped caption) follows from the seed and
the batch's number (`deltaconv_core.distill.order`, `.session`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.sampler_helpers
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....deltaconv_core.distill import Batch
from ....deltaconv_core.distill.order import Order
from ....deltaconv_core.distill.session import draw
from ....deltaconv_core.errors import DeltaConvError
from .network import LoadedModel

# Parts of a conditioning that a sampler acts on outside the model; a batch here would pass them over.
OUTSIDE = ("area", "control", "gligen", "hooks", "mask", "strength", "start_percent", "end_percent")
NEUTRAL = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}


@dataclass(frozen=True)
class Sample:
    """A latent (1, C, H, W) as the model takes it, with one frame (1, C, 1, H, W) where it takes frames, and
    what it is to be drawn from, as ComfyUI's samplers keep it."""

    latent: Tensor
    condition: dict[str, Any]


@dataclass
class Dataset:
    """What there is to learn from.

    Args:
        samples: at least one.
        empty: stands in for dropped captions; None: none are dropped.
    """

    samples: list[Sample]
    empty: dict[str, Any] | None = None
    sizes: dict[tuple[int, int], int] = field(init=False)
    """(height, width) of latents -> how many."""

    def __post_init__(self) -> None:
        self.sizes = {}
        for sample in self.samples:
            size = (sample.latent.shape[-2], sample.latent.shape[-1])
            self.sizes[size] = self.sizes.get(size, 0) + 1

    @property
    def largest(self) -> list[int]:
        """Shape of the latent with the most values."""
        return list(max((sample.latent for sample in self.samples), key=torch.Tensor.numel).shape)

    @property
    def fingerprint(self) -> str:
        """Differs when anything in it does."""
        digest = hashlib.sha256()
        for sample in self.samples:
            _digest(digest, [sample.latent, sample.condition])
        _digest(digest, self.empty)
        return digest.hexdigest()[:16]

    @property
    def warnings(self) -> list[str]:
        """What makes it unfit to learn from, though it can be done."""
        latents = [sample.latent for sample in self.samples]
        if not any(latent.any() for latent in latents):
            return ["the latents are empty, so the blocks learn from noise alone; connect encoded pictures"]
        if len(latents) > 1 and all(latent.equal(latents[0]) for latent in latents):
            return ["all latents are the same picture; connect varied ones"]
        return []

    @property
    def description(self) -> str:
        sizes = ", ".join(f"{count} of {width}x{height}" for (height, width), count in self.sizes.items())
        return f"{len(self.samples)} latents ({sizes})"


def read_dataset(
    model: ModelPatcher, latents: Sequence[Any], positive: Sequence[Any], negative: Any
) -> Dataset:
    """The samples in lists of LATENTs and CONDITIONINGs: single ones, batches, one per bucket, mixed sizes.

    One condition serves all latents; else there must be as many.

    Args:
        model: ModelPatcher.
        latents, positive: all that came in through the node's sockets.
        negative: likewise, for dropped captions; None or empty where nothing is connected.

    Raises:
        DeltaConvError: other counts, another model's latents, or conditions that cannot be learned with.
    """
    pictures = [picture for latent in latents for picture in _pictures(model, latent["samples"])]
    conditions = _conditions(positive, "positive")
    if not pictures:
        raise DeltaConvError("there are no latents to learn from; connect at least one picture")
    if len(conditions) == 1:
        conditions *= len(pictures)
    if len(conditions) != len(pictures):
        raise DeltaConvError(
            f"latents holds {len(pictures)} pictures, positive holds {len(conditions)} conditions; connect "
            "as many, or one condition for all"
        )
    empty = _conditions(negative or [], "negative")
    if len(empty) > 1:
        raise DeltaConvError(f"negative holds {len(empty)} conditions; connect one, for dropped captions")
    samples = [Sample(*pair) for pair in zip(pictures, conditions, strict=True)]
    return Dataset(samples, empty[0] if empty else None)


class Batches:
    """Batches by number.

    Args:
        network: encodes the captions.
        dataset: the samples. Those of a batch have one size, and captions that fit into one call.
        batch_size: samples in each batch; the last of a size take in some from its beginning.
        seed: what everything random follows from.
        dropout: part of the captions that the dataset's empty one stands in for, if it has one.
        by_batch: drop either all captions of a batch or none; so it is anyway where the empty one and the
            batch's do not fit into one call, as texts of other lengths do not in PixArt or Qwen-Image.
    """

    def __init__(
        self,
        network: LoadedModel,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        dropout: float,
        *,
        by_batch: bool = False,
    ) -> None:
        self.network = network
        self.dataset = dataset
        self.seed = seed
        self.dropout = dropout if dataset.empty is not None else 0.0
        self.by_batch = by_batch
        self.order = Order(self._group(), batch_size, seed)

    def __call__(self, number: int) -> Batch:
        samples = [self.dataset.samples[i] for i in self.order(number)]
        clean = torch.cat([sample.latent for sample in samples])
        count = len(self.network.sigmas)
        by_batch = self.by_batch or not self._takes_empty(samples[0])
        noise, levels, dropped = draw(self.seed, number, clean.shape, count, self.dropout, by_batch=by_batch)
        empty = self.dataset.empty
        encoded = [
            self.network.encode(empty if drop and empty is not None else sample.condition, sample.latent)
            for sample, drop in zip(samples, dropped.tolist(), strict=True)
        ]
        device = self.network.device
        sigma = self.network.sigmas.to(device)[levels.to(device)]
        return self.network.batch(clean.to(device), noise.to(device), sigma, self.network.join(encoded))

    def _takes_empty(self, sample: Sample) -> bool:
        """Whether the empty caption fits into one call with the sample's, if any is ever dropped."""
        empty = self.dataset.empty
        if empty is None or not self.dropout:
            return True
        first, second = (self.network.encode(one, sample.latent) for one in (empty, sample.condition))
        return self.network.fit(first, second)

    def _group(self) -> list[list[int]]:
        groups: list[tuple[torch.Size, dict[str, Any], list[int]]] = []
        for number, sample in enumerate(self.dataset.samples):
            encoded = self.network.encode(sample.condition, sample.latent)
            for shape, first, members in groups:
                if shape == sample.latent.shape and self.network.fit(encoded, first):
                    members.append(number)
                    break
            else:
                groups.append((sample.latent.shape, encoded, [number]))
        return [members for _, _, members in groups]


def _pictures(model: ModelPatcher, samples: Tensor) -> Iterator[Tensor]:
    latent_format = model.get_model_object("latent_format")
    channels, frames = latent_format.latent_channels, latent_format.latent_dimensions == 3
    if frames and samples.ndim == 4:
        samples = samples[:, :, None]
    if samples.ndim != 4 + frames or samples.shape[1] != channels or (frames and samples.shape[2] != 1):
        raise DeltaConvError(
            f"expected latents (B, {channels}, {'1, ' * frames}H, W) for this MODEL, got "
            f"{tuple(samples.shape)}; encode the pictures with the VAE that belongs to it"
        )
    if not samples.isfinite().all():
        raise DeltaConvError("latents hold NaN or infinite values; encode those pictures again, in float32")
    with torch.inference_mode(False):
        # clone: what was made in inference mode cannot take part in training
        inside = model.model.process_latent_in(samples.clone().float().cpu())
    yield from inside.split(1)


def _conditions(given: Sequence[Any], name: str) -> list[dict[str, Any]]:
    conditions = comfy.sampler_helpers.convert_cond([one for group in given for one in group])
    for condition in conditions:
        there = {key: condition[key] for key in OUTSIDE if condition.get(key) is not None}
        outside = [key for key, value in there.items() if key not in NEUTRAL or value != NEUTRAL[key]]
        if outside:
            raise DeltaConvError(
                f"{name} has conditioning with {', '.join(outside)}, which distillation would pass over; "
                "connect plain text conditioning"
            )
        text = condition.get("cross_attn")
        if text is not None and len(text) != 1:
            raise DeltaConvError(
                f"{name} has a batch of {len(text)} texts in one conditioning; connect one for each picture"
            )
    with torch.inference_mode(False):
        return [_normal(condition) for condition in conditions]


def _normal(value: Any) -> Any:
    """The value with copies of its tensors, which may have been made in inference mode."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _normal(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_normal, value))
    return value


def _digest(digest: Any, value: Any) -> None:
    """Takes in tensors, numbers and texts; other objects are not the same in another session."""
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous()
        digest.update(f"{data.dtype} {tuple(data.shape)}".encode())
        digest.update(data.flatten().view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        for key in sorted(value.keys() - {"uuid"}):
            digest.update(str(key).encode())
            _digest(digest, value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            _digest(digest, item)
    elif isinstance(value, (str, int, float)):
        digest.update(repr(value).encode())
