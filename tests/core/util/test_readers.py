"""Every reader of values that others wrote: deep, endless and foreign ones are our own error, soon."""

from __future__ import annotations

import json
import time

import pytest

from deltaconv_core.block.ops import fastest
from deltaconv_core.diffusers.distill.parse import read_options
from deltaconv_core.errors import DeltaConvError
from deltaconv_core.locality.recommend import Recommendation
from deltaconv_core.sites import site_channels
from deltaconv_core.sites.choose_specs import ModelShape, block_specs

DEEP = ["[" * n + "]" * n for n in (70, 900, 100_000)]
FOREIGN = [
    *DEEP,
    '{"kind": ' * 100_000,
    "1" * 5000,
    r'"\ud800"',
    '{"down": 1e400}',
    '{"down": true}',
    "[1]",
]


@pytest.mark.parametrize("text", FOREIGN)
def test_kernel_sizes(text):
    shape = ModelShape("sd15", site_channels("sd15"), 4)
    for given in (text, f'{{"kind": {text}}}', f'{{"down": {text}}}'):
        with pytest.raises(DeltaConvError) as caught:
            block_specs(shape, list(shape.channels), given)
        assert len(str(caught.value)) <= 2000
        str(caught.value).encode()


@pytest.mark.parametrize("text", FOREIGN)
@pytest.mark.parametrize("field", ["architecture", "kernel_sizes", "skip", "version", "kind", None])
def test_recommendations(text, field):
    values = json.loads(Recommendation("sd15", {"a": 5}).to_json())
    if field is not None:
        text = json.dumps(values | {field: "HERE"}).replace('"HERE"', text)
    with pytest.raises(DeltaConvError) as caught:
        Recommendation.from_json(text)
    assert len(str(caught.value)) <= 2000


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("ending", ["json", "yaml"])
@pytest.mark.parametrize(
    "value",
    [
        *FOREIGN,
        "2020-01-01",
        "2020-99-99",
        "!!binary aGk=",
        "!!set {a, b}",
        "? [a]\n: b",
        "- " * 4000,
        "{" * 4000,
    ],
)
def test_options_in_a_file(tmp_path, ending, value):
    file = tmp_path / f"options.{ending}"
    start = time.process_time()
    for text in (value, f"layer_steps: {value}", f'{{"model": "m", "data": "d", "layer_steps": {value}}}'):
        file.write_text(text)
        with pytest.raises(DeltaConvError) as caught:
            read_options({}, file)
        assert len(str(caught.value)) <= 2000
    assert time.process_time() - start < 10


def test_aliases_do_not_multiply(tmp_path):
    (tmp_path / "options.yaml").write_text(f"{BOMB}layer_steps: *i\n")
    with pytest.raises(DeltaConvError, match="aliases"):
        read_options({}, tmp_path / "options.yaml")


@pytest.mark.parametrize(
    "text", [*FOREIGN, *(f'{{"version": {fastest.FILE_VERSION}, "choices": {deep}}}' for deep in DEEP)]
)
def test_the_file_of_what_is_fastest_is_measured_again(tmp_path, text):
    (tmp_path / "fastest.json").write_text(text)
    assert fastest._load(tmp_path / "fastest.json") == {}
