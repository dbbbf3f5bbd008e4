"""The widgets of ΔConv Distill, made of what is known of each setting, and their values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from comfy_api.latest import io

from ....deltaconv_core.distill.fields import RUN, TRAINING, About, about, by_name
from ....deltaconv_core.distill.job import Job
from ...sockets import ADVANCED
from ..files.choice import FileChoice
from . import runs
from .presets import CUSTOM, PRESETS, Preset

OTHER_NAMES = {"seed": "training_seed"}
"""By setting, widgets that are named otherwise. ComfyUI's frontend changes one called seed after each run."""


@dataclass(frozen=True, kw_only=True)
class Widgets(Job):
    """The values of all widgets, under the names of their settings."""

    preset: str = field(
        default="12 GB",
        metadata=about(
            TRAINING,
            "sets what decides memory use for a graphics card of this size: batch_size, accumulation, "
            "precision, optimizer (8-bit where bitsandbytes is installed) and ema; custom takes the inputs "
            "of those names. Worked out by arithmetic, not measured on such cards",
            choices=(CUSTOM, *PRESETS),
        ),
    )
    run_name: str = field(
        default="run",
        metadata=about(
            RUN,
            "name of a new run's folder in output/deltaconv_runs; a number is added, so no run is ever "
            "overwritten",
        ),
    )
    resume: str = field(
        default=runs.NEW,
        metadata=about(
            RUN,
            "a run to resume, exactly as if it had not stopped; leave the other inputs as they were (the "
            "numbers of steps may grow). The last changed run comes first",
        ),
    )
    preview_every: int = field(
        default=100,
        metadata=about(
            RUN,
            "steps between preview pictures: the teacher's left, the student's right, from the first caption "
            "and the same noise; 0: none",
            least=0,
            offered=(0, 1_000_000),
        ),
    )

    @classmethod
    def read(cls, lists: Mapping[str, Sequence[Any]]) -> Widgets:
        """The values as the node gets them: lists by the widgets' names; a prompt may leave some out."""
        names = {other: name for name, other in OTHER_NAMES.items()}
        return cls(**{names.get(name, name): items[0] for name, items in lists.items()})


SETTINGS = by_name(Widgets)
OF_PRESETS = tuple(one.name for one in fields(Preset))


def widget(name: str, *, optional: bool = False) -> io.WidgetInput:
    """The widget of a setting."""
    one = SETTINGS[name]
    known, default = About.of(one), one.default
    kind: type = type(default)
    custom = " Only with preset custom." if name in OF_PRESETS else ""
    common: dict[str, Any] = {
        **(ADVANCED if optional else {}),
        "id": OTHER_NAMES.get(name, name),
        "default": default,
        "optional": optional,
        "tooltip": known.sentence + custom,
    }
    if name == "resume":
        return FileChoice(names=runs.choices, **common)
    if known.choices:
        return io.Combo.Input(options=list(known.choices), **common)
    if kind is bool:
        return io.Boolean.Input(**common)
    if kind is str:
        return io.String.Input(**common)
    low, high = map(kind, known.offered or (known.least, known.most))
    number = io.Int if kind is int else io.Float
    return number.Input(min=low, max=high, step=known.step, **common)
