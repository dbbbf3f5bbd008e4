"""Lists and tables for people."""

from __future__ import annotations

import pytest

from deltaconv_core.util.text import aligned, listing, markdown


@pytest.mark.parametrize(
    ("names", "text"),
    [([], "nothing"), (["b", "a"], "b, a"), ("cba", "c, b, a"), ("abcde", "a, b, c and 2 more")],
)
def test_the_first_few_names(names, text):
    assert listing(names) == text


def test_aligned_columns():
    assert aligned([("site", "K"), ("a", "13"), ("longer", "")]) == ["site    K", "a       13", "longer"]


def test_a_column_of_single_characters_is_a_column_of_the_table():
    """Below its head stands a dash too: a colon alone would make all of it plain text."""
    assert markdown([{"site": "a", "K": "5"}]) == ["| site |  K |", "| ---- | -: |", "| a    |  5 |"]
