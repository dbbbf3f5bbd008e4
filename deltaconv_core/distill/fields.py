"""What is known of a setting beside its name and default; checks, help and widgets are made of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

from ..errors import DeltaConvError

DATA, BLOCKS, TRAINING, RUN = PARTS = ("teacher and data", "blocks", "training", "the run")


@dataclass(frozen=True)
class About:
    """One setting.

    Args:
        part: of `PARTS`, what it belongs to.
        text: what it does, with its unit; without a capital and a full stop.
        least, most: smallest and largest value.
        above: what it has to be above; it has to be finite then.
        below: what it has to be below.
        offered: (smallest, largest) value that a widget offers; None: `least` and `most`.
        step: the smallest change that a widget makes; None: ComfyUI's own.
        choices: the texts that are allowed; none: all.
        shown: stands for the value in the help, or for a default that is worked out later.
    """

    part: str
    text: str
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    offered: tuple[float, float] | None = None
    step: float | None = None
    choices: tuple[str, ...] = ()
    shown: str = ""

    @classmethod
    def of(cls, one: Field[Any]) -> About:
        """What is known of a field."""
        known: About = one.metadata["about"]
        return known

    @property
    def sentence(self) -> str:
        """The text as a sentence."""
        return f"{self.text[0].upper()}{self.text[1:]}."

    def expects(self, value: Any) -> str:
        """What was expected, if a value is not that; else empty."""
        if self.choices:
            return "" if value in self.choices else f"to be one of {', '.join(self.choices)}"
        values = value if isinstance(value, tuple) else (value,)
        return "" if all(map(self._within, values)) else self._range()

    def _within(self, value: Any) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or self.above < value < math.inf)
            and (self.below is None or value < self.below)
        )

    def _range(self) -> str:
        if self.above is not None:
            return f"above {self.above}"
        if self.most is None and self.below is None:
            return f"to be at least {self.least}"
        return f"from {self.least} to " + (f"below {self.below}" if self.most is None else f"{self.most}")


def about(part: str, text: str, **more: Any) -> dict[str, About]:
    """The metadata of a field; see `About`."""
    return {"about": About(part, text, **more)}


def check_fields(record: Any) -> None:
    """Checks all fields of a dataclass of settings.

    Raises:
        DeltaConvError: the first value that makes no sense, named.
    """
    for one in fields(record):
        value = getattr(record, one.name)
        if value is None and one.default is None:
            continue
        whole = type(one.default) is int
        expected = (
            "to be a whole number" if whole and not isinstance(value, int) else About.of(one).expects(value)
        )
        if expected:
            raise DeltaConvError(f"expected {one.name} {expected}, got {value!r}")


def by_name(kind: Any) -> Mapping[str, Field[Any]]:
    """The fields of a dataclass of settings."""
    return {one.name: one for one in fields(kind)}


def default_text(one: Field[Any]) -> str:
    """A field's default as a user reads it."""
    if one.default is MISSING:
        return "required"
    if one.default in (None, ""):
        return About.of(one).shown
    if isinstance(one.default, bool):
        return "on" if one.default else "off"
    return ",".join(map(str, one.default)) if isinstance(one.default, tuple) else str(one.default)
