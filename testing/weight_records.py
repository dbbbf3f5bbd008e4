"""Shared by the fetch tests: small weights, records of them, and fetching in another process."""

from __future__ import annotations

import hashlib
import multiprocessing
import random
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy
from safetensors.numpy import save

from deltaconv_core.weights.fetch import resolve
from deltaconv_core.weights.manifest import HubSource, Record, RepositorySource, SpecHints, UrlSource

SPAWN = multiprocessing.get_context("spawn")


def weights(size: int, seed: int = 0) -> bytes:
    """A whole safetensors file of `size` bytes, of noise."""
    room = size - 256
    noise = numpy.frombuffer(random.Random(seed).randbytes(room), numpy.uint8)
    short = size - len(save({"w": noise}, {"pad": ""}))
    header, rest = _split(save({"w": noise}, {"pad": ""}))
    padded = header + b" " * short  # the format allows a header that ends in spaces
    return len(padded).to_bytes(8, "little") + padded + rest


def _split(body: bytes) -> tuple[bytes, bytes]:
    end = 8 + int.from_bytes(body[:8], "little")
    return body[8:end], body[end:]


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def record(
    source: HubSource | UrlSource | RepositorySource,
    body: bytes | None = None,
    *,
    name: str = "weights",
    size: int | None = None,
    digest: str | None = None,
) -> Record:
    """A record; with `body`, of known size and hash."""
    return Record(
        name=name,
        title="Weights",
        architecture="sd15",
        base_model="a model",
        recommended_for=(),
        source=source,
        size=len(body) if body is not None else size,
        sha256=sha256(body) if body is not None else digest,
        hints=SpecHints(),
        license="MIT",
        citation="nobody",
    )


def fetch(wanted: Record, folder: Path, barrier: Barrier | None = None) -> Path:
    """`resolve`, for another process; with a barrier, at the same moment as others."""
    if barrier:
        barrier.wait(30)
    return resolve(wanted, folder)


def leftovers(folder: Path) -> set[str]:
    """Names of the files in a folder, without locks."""
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}
