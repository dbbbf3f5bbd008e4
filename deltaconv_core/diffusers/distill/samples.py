"""Pictures and captions, encoded once and kept on disk; afterwards the encoders are no longer needed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...distill import session
from ...errors import DeltaConvError
from .accelerated import AcceleratedProcesses
from .buckets import PictureSize, corner, fit, make_buckets, nearest
from .cache import Cache
from .families import Cut
from .pictures import Picture, open_picture
from .teacher import Teacher, text_encoders, weights_fingerprint

ENCODING_VERSION = 1
"""Of the way in which pictures become latents; another one makes all cached ones out of date."""
PATIENCE = 60.0
"""Seconds that what another process has encoded may take to show."""


@dataclass(frozen=True)
class Sample:
    """One picture to learn from; its latent and its caption's tensors are in files of the cache."""

    latent: Path
    texts: Path
    cut: Cut


@dataclass(frozen=True)
class Samples:
    """All that there is to learn from.

    Args:
        samples: at least one.
        empty: the file of the empty caption's tensors.
    """

    samples: Sequence[Sample]
    empty: Path

    def groups(self) -> list[list[int]]:
        """The numbers of the samples of each size."""
        groups: dict[PictureSize, list[int]] = {}
        for number, sample in enumerate(self.samples):
            groups.setdefault(sample.cut.target, []).append(number)
        return list(groups.values())

    @property
    def fingerprint(self) -> str:
        """Differs when a picture, its place in the list, a caption, a size or an encoder does."""
        names = [(one.latent.name, one.texts.name, one.cut) for one in self.samples]
        return session.fingerprint([repr((names, self.empty.name))])

    @property
    def description(self) -> str:
        sizes = ", ".join(
            f"{len(group)} of {width}x{height}"
            for group in self.groups()
            for height, width in [self.samples[group[0]].cut.target]
        )
        return f"{len(self.samples)} pictures ({sizes})"


ShowProgress = Callable[[Sequence[Any], str], Iterable[Any]]
"""Goes through items, and shows how far it is."""


def encode_samples(
    teacher: Teacher,
    pictures: Sequence[Picture],
    sizes: tuple[int, float],
    cache: Cache,
    processes: AcceleratedProcesses,
    progress: ShowProgress,
) -> Samples:
    """Encodes what the cache lacks, each process its part.

    Args:
        teacher: its encoders go to the device one after the other, and are forgotten in the end.
        pictures: at least one.
        sizes: resolution and largest ratio of the sides, as `make_buckets` takes them.
        cache: where all of it is kept.
        processes: all that train together; they see one cache.
        progress: shown while encoding.

    Raises:
        DeltaConvError: a picture that cannot be read, or a cache that not all processes see.
    """
    buckets = make_buckets(sizes[0], teacher.step, sizes[1])
    targets = {picture: nearest(picture.size, buckets) for picture in pictures}
    pipeline = teacher.pipeline
    vae, texts = weights_fingerprint(pipeline.vae), _text_fingerprint(pipeline)
    latents = {
        picture: cache.entry("latents", ENCODING_VERSION, vae, _range(pipeline.vae), picture.digest, target)
        for picture, target in targets.items()
    }
    captions = {
        caption: cache.entry("texts", ENCODING_VERSION, texts, caption)
        for caption in {"", *(picture.caption for picture in pictures)}
    }
    _encode_pictures(teacher, _missing(latents, processes), targets, cache, processes, progress)
    _encode_captions(teacher, _missing(captions, processes), cache, processes, progress)
    teacher.free()
    processes.wait()
    if lost := _absent([*latents.values(), *captions.values()]):
        raise DeltaConvError(
            f"process {processes.number} does not see {lost[0]}, which another one encoded; put --cache and "
            "--output on a disk that all machines share"
        )
    samples = [
        Sample(
            latents[picture],
            captions[picture.caption],
            Cut(picture.size, corner(picture.size, target)[1], target),
        )
        for picture, target in targets.items()
    ]
    return Samples(samples, captions[""])


def _missing(entries: Mapping[Any, Path], processes: AcceleratedProcesses) -> list[tuple[Any, Path]]:
    """Those that this process is to make."""
    processes.wait()  # nobody makes anything before all have looked
    missing = sorted({entry: what for what, entry in entries.items() if not entry.is_file()}.items())
    processes.wait()
    return [(what, entry) for entry, what in missing[processes.number :: processes.count]]


def _absent(entries: Sequence[Path]) -> list[Path]:
    """Those that are not there, even after a while: disks in a network remember what was not there."""
    end = time.monotonic() + PATIENCE
    while (absent := [entry for entry in entries if not entry.is_file()]) and time.monotonic() < end:
        time.sleep(1)
    return absent


@torch.no_grad()
def _encode_pictures(
    teacher: Teacher,
    missing: Sequence[tuple[Picture, Path]],
    targets: Mapping[Picture, PictureSize],
    cache: Cache,
    processes: AcceleratedProcesses,
    progress: ShowProgress,
) -> None:
    """The mean of what the VAE takes each picture for, scaled as the network takes it."""
    if not missing:
        return
    vae = teacher.pipeline.vae.to(processes.device)
    shift, scale = _range(vae)
    for picture, entry in progress(missing, "pictures"):
        pixels = _pixels(fit(open_picture(picture.path), targets[picture])).to(processes.device)
        latent = (vae.encode(pixels).latent_dist.mean - shift) * scale
        cache.write(entry, {"latent": latent})
    vae.to("cpu")


@torch.no_grad()
def _encode_captions(
    teacher: Teacher,
    missing: Sequence[tuple[str, Path]],
    cache: Cache,
    processes: AcceleratedProcesses,
    progress: ShowProgress,
) -> None:
    if not missing:
        return
    for encoder in text_encoders(teacher.pipeline):
        encoder.to(processes.device)
    for caption, entry in progress(missing, "captions"):
        cache.write(entry, teacher.family.encode(teacher.pipeline, caption, processes.device))


def _range(vae: Any) -> tuple[float, float]:
    """What is taken from a VAE's latents, and what they are then multiplied by."""
    return vae.config.get("shift_factor") or 0.0, vae.config.scaling_factor


def _pixels(picture: Any) -> Tensor:
    """(1, 3, H, W) from -1 to 1."""
    values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return values.view(picture.height, picture.width, 3).permute(2, 0, 1)[None] / 127.5 - 1


def _text_fingerprint(pipeline: Any) -> str:
    """Differs for other encoders, or other tokens for the same words."""
    tokens = [
        getattr(pipeline, name)("The quick brown fox, 12!", padding="max_length", max_length=24).input_ids
        for name in ("tokenizer", "tokenizer_2")
        if getattr(pipeline, name, None) is not None
    ]
    limits = [getattr(pipeline.tokenizer, "model_max_length", None)]
    return weights_fingerprint(*text_encoders(pipeline)) + json.dumps(
        [tokens, limits, type(pipeline).__name__]
    )
