"""JSON that others wrote, and errors that quote it."""

from __future__ import annotations

import json

import pytest

from deltaconv_core.errors import LONGEST_MESSAGE, CheckpointError, DeltaConvError
from deltaconv_core.util.foreign_json import DEEPEST, parse_json, parse_list, read_json
from deltaconv_core.util.text import quoted, shortened


@pytest.mark.parametrize("value", [None, 1.5, "ä\U0001f600", [], {"a": [{"b": {}}]}, [[]] * 1000])
def test_ordinary_values_come_back(value):
    assert parse_json(json.dumps(value)) == parse_json(json.dumps(value).encode()) == value


@pytest.mark.parametrize("opening", ["[", '{"a": ', '[0, {"a": [', "[[0], "])
@pytest.mark.parametrize("depth", [DEEPEST + 1, 400, 900, 100_000])
def test_deep_values_are_refused_whatever_they_are_made_of(opening, depth):
    """json takes some of these, and what then prints, compares or checks the value does not."""
    closing = "".join({"[": "]", "{": "}"}[c] for c in reversed(opening) if c in "[{")
    if opening == "[[0], ":
        closing = "]"
    with pytest.raises(ValueError, match="levels deep"):
        parse_json(opening * depth + "0" + closing * depth)


def test_the_deepest_that_is_taken_can_be_printed_and_compared():
    text = "[" * DEEPEST + "]" * DEEPEST
    assert parse_json(text) == parse_json(text) and repr(parse_json(text)) == text == json.dumps(
        parse_json(text)
    )


@pytest.mark.parametrize("depth", [100, 400, 900, 5000, 200_000])
def test_one_deep_item_leaves_the_others_readable(depth):
    deep = "[" * depth + "]" * depth
    items = [
        '{"a": "]["}',
        f'{{"b": [1, {deep}, {{}}]}}',
        r'"\\"',
        deep,
        deep,
        ' [1, [2, {"c": 3}]] ',
        r'"\""',
    ]
    text = f" [{','.join(items)}]\n"
    first, second, third, *more, sixth, last = parse_list(text)
    assert (first, third, sixth, last) == ({"a": "]["}, "\\", [1, [2, {"c": 3}]], '"')
    assert all(isinstance(one, ValueError) and "levels deep" in str(one) for one in (second, *more))
    assert len(more) == 2


@pytest.mark.parametrize("text", ["{}", "1", '{"a": ' + "[" * 100_000, "[1, 2", "[" * 100_000, ""])
def test_what_is_no_list(text):
    try:
        items = parse_list(text)
    except ValueError:
        return
    assert all(isinstance(item, ValueError) for item in items)


@pytest.mark.parametrize("text", ['"\\ud800"', '{"\\udfff": 1}', '[["a", {"b": "x\\ud912"}]]'])
def test_half_a_surrogate_pair_is_refused(text):
    with pytest.raises(ValueError, match="surrogates"):
        parse_json(text)


@pytest.mark.parametrize("text", ["", "{", b"\xff", "1" * 5000 + "]", "\0"])
def test_what_is_no_json(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_files(tmp_path):
    (tmp_path / "a.json").write_text('\ufeff{"ä": 1}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"ä": 1}
    (tmp_path / "a.json").write_bytes(b'{"\xff": 1}')
    with pytest.raises(ValueError, match="utf-8"):
        read_json(tmp_path / "a.json")
    with pytest.raises(OSError, match="No such file"):
        read_json(tmp_path / "b.json")


@pytest.mark.parametrize("value", ["x" * 10**7, b"\0" * 10**7, ["y" * 50] * 1000, {"a": "z" * 10**6}])
def test_quotes_are_short(value):
    assert (
        len(quoted(value)) <= 80
        and quoted(value)[:6] == repr(value)[:6]
        and quoted(value)[-1] == repr(value)[-1]
    )


def test_short_quotes_are_as_python_writes_them():
    assert quoted("it's\n") == repr("it's\n") and quoted((1, None)) == "(1, None)"
    assert shortened("abc", 3) == "abc" and shortened("a" * 50 + "z" * 50, 20) == "aaaaaaaaaa ... zzzzz"


@pytest.mark.parametrize("kind", [DeltaConvError, CheckpointError])
def test_no_error_is_longer_than_a_page(kind):
    error = kind("x" * 30_000_000 + "; get the file again")
    assert len(str(error)) == LONGEST_MESSAGE and str(error).endswith("; get the file again")
    assert str(kind("short")) == "short"
