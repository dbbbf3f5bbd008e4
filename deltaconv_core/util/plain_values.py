"""Dataclasses from the plain values of a file's header."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from ..errors import DeltaConvError

T = TypeVar("T")


def built(cls: type[T], values: Mapping[str, Any], needed: Sequence[str], what: str) -> T:
    """An instance of a dataclass.

    Args:
        cls: the dataclass.
        values: by the names of its fields.
        needed: fields that must be among them.
        what: the values are, for the message.

    Raises:
        DeltaConvError: an unknown or missing field, or a value that the class refuses.
    """
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    missing = [name for name in needed if name not in values]
    if unknown or missing:
        raise DeltaConvError(f"expected {what} among {known}, got unknown {unknown}, missing {missing}")
    return cls(**values)
