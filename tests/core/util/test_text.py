"""Lists and tables for people."""

from __future__ import annotations

import pytest

from deltaconv_core.util.text import aligned, listing


@pytest.mark.parametrize(
    ("names", "text"),
    [([], "nothing"), (["b", "a"], "b, a"), ("cba", "c, b, a"), ("abcde", "a, b, c and 2 more")],
)
def test_the_first_few_names(names, text):
    assert listing(names) == text


def test_aligned_columns():
    assert aligned([("site", "K"), ("a", "13"), ("longer", "")]) == ["site    K", "a       13", "longer"]
