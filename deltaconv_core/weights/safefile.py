"""Safetensors files with care: nothing else is opened, and a file is written whole or not at all."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import CheckpointError
from ..util.whole_file import replacing
from .layout import LARGEST_HEADER, Layout

Pathlike = str | os.PathLike[str]
BEGINNING = 40  # bytes that tell what a file is
PICKLE_STARTS = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # zip, or a protocol number


def read_header(path: Pathlike) -> dict[str, str]:
    """The header's texts alone, without reading any tensor.

    Raises:
        CheckpointError: no such file, not safetensors, or truncated.
    """
    with _opened(Path(path)) as (_, layout):
        return layout.texts


def read_file(path: Pathlike, *, numbers: bool = False) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Reads header texts and tensors (on the CPU, in memory of their own, all finite floating point numbers).

    Args:
        path: the file.
        numbers: whether tensors may hold whole numbers too, as an optimizer's may.

    Raises:
        CheckpointError: no such file, not safetensors, truncated or inconsistent, or a tensor with NaN or
            infinity, or of a dtype that weights do not have.
    """
    path = Path(path)
    with _opened(path) as (file, layout):
        tensors = {name: layout.read(file, name) for name in layout.entries}
    for name, tensor in tensors.items():
        _check_numbers(path, name, tensor, numbers)
    return layout.texts, tensors


def write_file(
    path: Pathlike, tensors: Mapping[str, Tensor], header: Mapping[str, str], *, numbers: bool = False
) -> None:
    """Writes a safetensors file beside its place and moves it there: a kill at any moment leaves old or new.

    Args:
        path, tensors, header: what to write where.
        numbers: as in `read_file`.

    Raises:
        CheckpointError: the place cannot be written, or a tensor is not finite.
    """
    path = Path(path)
    ready = _separate({name: tensor.detach().to("cpu") for name, tensor in tensors.items()})
    for name, tensor in ready.items():
        _check_numbers(path, name, tensor, numbers)
    try:
        with replacing(path, durable=True) as part:
            with open(part, "xb") as file:
                mode = os.fstat(file.fileno()).st_mode
            safetensors.torch.save_file(ready, part, dict(header))
            os.chmod(part, mode & 0o777)  # safetensors makes files that only their owner may read
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {path} ({error}); choose another place or free some space"
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, Layout]]:
    """A safetensors file; whatever is wrong with it is a CheckpointError."""
    if not os.path.isfile(path):
        raise CheckpointError(f"there is no file {path}{_about_link(path)}; check its name")
    try:
        with path.open("rb") as file:
            _check_start(path, file)
            yield file, Layout.of(file)
    except CheckpointError:
        raise
    except (OSError, ValueError, RuntimeError, MemoryError) as error:  # torch may lack memory
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); download or save it again"
        ) from error


def _about_link(path: Path) -> str:
    try:
        return f", which is a link to {os.readlink(path)}"
    except (OSError, ValueError):
        return ""


def _check_start(path: Path, file: BinaryIO) -> None:
    """Recognizes what is often mistaken for a safetensors file, before anything parses it."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(BEGINNING)
    if _header_length(start) <= size - 8:
        return
    if start[:2] in PICKLE_STARTS:
        raise CheckpointError(
            f"{path} is a PyTorch pickle, which can run code when opened; only safetensors files are "
            "accepted, so ask for the file in that format"
        )
    raise CheckpointError(
        f"{path} is not a whole safetensors file: it has {size} bytes and begins with {start!r}; download or "
        "save it again"
    )


def begins_well(path: Path) -> bool:
    """Whether a file begins as safetensors do, whatever follows; the rest of it may be still to come."""
    with open(path, "rb") as file:
        return _header_length(file.read(BEGINNING)) <= LARGEST_HEADER


def _header_length(start: bytes) -> float:
    """Bytes of the header, which is a JSON object, as the eight bytes before it say; infinite without any."""
    return int.from_bytes(start[:8], "little") if start[8:9] == b"{" else math.inf


def _check_numbers(path: Path, name: str, tensor: Tensor, numbers: bool) -> None:
    if not tensor.is_floating_point():
        if numbers:
            return
        raise CheckpointError(
            f"{path}: {name} holds {tensor.dtype}, expected floating point weights; choose another file"
        )
    finite = (tensor.float() if tensor.element_size() == 1 else tensor).isfinite()
    if not finite.all():
        bad = tensor.numel() - int(finite.sum())
        raise CheckpointError(
            f"{path}: {name} holds {bad} NaN or infinite values of {tensor.numel()}; "
            "the training that made it diverged, or the file is damaged: use another one"
        )


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as the format wants them."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.numel() * tensor.element_size()
        if not whole or storage.data_ptr() in seen:
            tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(tensors[name].untyped_storage().data_ptr())
    return tensors
