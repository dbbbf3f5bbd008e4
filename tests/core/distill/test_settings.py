"""What is known of a setting: checks, bounds, and what a user reads."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields

import pytest

from deltaconv_core.distill import Settings
from deltaconv_core.distill.fields import PARTS, TRAINING, About, about, check_fields, default_text
from deltaconv_core.distill.job import Job
from deltaconv_core.errors import DeltaConvError


@dataclass
class Example:
    whole: int = field(default=1, metadata=about(TRAINING, "a number", least=1))
    share: float = field(default=0.5, metadata=about(TRAINING, "a share", least=0, most=1))
    rest: tuple[float, float] = field(default=(0.5, 0.5), metadata=about(TRAINING, "two", least=0, below=1))
    rate: float = field(default=0.1, metadata=about(TRAINING, "a rate", above=0))
    kind: str = field(default="a", metadata=about(TRAINING, "a kind", choices=("a", "b")))
    side: str | None = field(
        default=None, metadata=about(TRAINING, "a side", shown="its own", choices=("a", "b"))
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"whole": 0}, "expected whole to be at least 1, got 0"),
        ({"whole": 1.5}, "expected whole to be a whole number, got 1.5"),
        ({"share": 1.5}, "expected share from 0 to 1, got 1.5"),
        ({"share": math.nan}, "expected share from 0 to 1, got nan"),
        ({"rest": (0.5, 1.0)}, r"expected rest from 0 to below 1, got \(0.5, 1.0\)"),
        ({"rate": 0.0}, "expected rate above 0, got 0.0"),
        ({"rate": math.inf}, "expected rate above 0, got inf"),
        ({"kind": None}, "expected kind to be one of a, b, got None"),
        ({"kind": "c"}, "expected kind to be one of a, b, got 'c'"),
    ],
)
def test_what_is_refused_is_named_with_what_was_expected(changes, message):
    check_fields(Example(share=1.0, rest=(0.0, 0.999), side=None))
    with pytest.raises(DeltaConvError, match=f"^{message}$"):
        check_fields(Example(**changes))


def test_defaults_as_a_user_reads_them():
    texts = [default_text(one) for one in fields(Example)]
    assert texts == ["1", "0.5", "0.5,0.5", "0.1", "a", "its own"]
    assert default_text(field(default=True)) == "on" and default_text(field()) == "required"


@pytest.mark.parametrize("kind", [Settings, Job])
def test_everything_is_known_of_every_setting(kind):
    for one in fields(kind):
        known = About.of(one)
        assert known.part in PARTS and known.text[0] != " " and not known.text.endswith(".")
        assert one.default is not MISSING and not known.expects(one.default)
        if known.offered:
            assert not any(map(known.expects, known.offered))
            assert known.offered[0] <= one.default <= known.offered[1]


def test_a_job_gives_the_settings_with_the_precision_decided():
    job = Job(layer_steps=3, seed=9, ema=0.5, blocks="mid")
    assert job.precision == "auto"
    assert job.settings("bf16") == Settings(layer_steps=3, seed=9, ema=0.5, precision="bf16")
    with pytest.raises(DeltaConvError, match="fp32, bf16, fp16, got 'auto'"):
        job.settings(job.precision)
