"""Where the tensors of a safetensors file lie, read with care.

The file is: eight bytes of the header's length, the header (a JSON object), the tensors' bytes without a gap.
It is read here, not mapped into memory as the safetensors library does it: when a mapped file is cut short by
another program, the system ends the process that reads it.
"""

from __future__ import annotations

import ctypes
import math
import os
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..util.foreign_json import parse_json
from ..util.text import quoted

LARGEST_HEADER = 4_000_000
"""Bytes; those of trained blocks, and of runs, have less than a fifth of it. A header takes 20 times its size
in memory."""
LARGEST_FILE, MOST_DIMENSIONS = 2**48, 16
DTYPES_BY_CODE = {
    name: getattr(torch, dtype)
    for name, dtype in {
        "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
        "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
        "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    }.items()
}  # fmt: skip
TEXTS = "__metadata__"


@dataclass(frozen=True)
class Entry:
    """One tensor: what it is, and the first byte of it in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """What a header says.

    Args:
        texts: the file's own.
        entries: the tensors by name, in the order of their names.
        size: of the file, in bytes.
    """

    texts: dict[str, str]
    entries: dict[str, Entry]
    size: int

    @classmethod
    def of(cls, file: BinaryIO) -> Layout:
        """Reads the header of an opened file, and sees that its tensors fill the file.

        Raises:
            OSError: it cannot be read.
            ValueError: a header that is not one, or of another file.
        """
        size = os.fstat(file.fileno()).st_size
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, LARGEST_HEADER):
            raise ValueError(
                f"its header has {length} bytes; the file has {size}, and at most {LARGEST_HEADER} are read"
            )
        header = parse_json(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is not an object")
        texts = header.pop(TEXTS, None) or {}
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise ValueError(f"the texts in its header are {quoted(texts)}")
        entries, spans = {}, []
        for name in sorted(header):
            entries[name], span = _read_entry(name, header[name], 8 + length)
            spans.append(span)
        _check_gapless(sorted(spans), size - 8 - length)
        return cls(texts, entries, size)

    def read(self, file: BinaryIO, name: str) -> Tensor:
        """A tensor, in memory of its own.

        Raises:
            OSError: it cannot be read.
            ValueError: the file was cut short.
        """
        entry = self.entries[name]
        values = torch.empty(entry.size, dtype=torch.uint8)
        file.seek(entry.start)
        buffer = (ctypes.c_char * entry.size).from_address(values.data_ptr()) if entry.size else bytearray()
        if file.readinto(buffer) != entry.size or os.fstat(file.fileno()).st_size != self.size:  # type: ignore[attr-defined]
            raise ValueError("it was changed while it was being read")
        return values.view(entry.dtype).reshape(entry.shape)


def _read_entry(name: str, values: Any, first: int) -> tuple[Entry, tuple[int, int]]:
    """A tensor, and its first and last byte among those of all tensors."""
    try:
        dtype, shape, (start, end) = values["dtype"], values["shape"], values["data_offsets"]
        whole = isinstance(shape, list) and len(shape) <= MOST_DIMENSIONS
        whole = whole and all(type(n) is int and 0 <= n < LARGEST_FILE for n in (*shape, start, end))
        entry = Entry(DTYPES_BY_CODE[dtype], tuple(shape), first + start)
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole or entry.size != end - start:
        raise ValueError(f"its tensor {quoted(name)} is {quoted(values, 200)}")
    return entry, (start, end)


def _check_gapless(spans: list[tuple[int, int]], size: int) -> None:
    at = 0
    for start, end in [*spans, (size, size)]:
        if start != at:
            raise ValueError(f"its tensors leave a gap, or overlap, at byte {min(start, at)} of {size}")
        at = end
