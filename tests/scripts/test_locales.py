"""Translations name what the nodes have."""

from __future__ import annotations

import json

import pytest

from scripts import locales

LANGUAGES = sorted(folder.name for folder in locales.FOLDER.iterdir())


def texts(language):
    return json.loads((locales.FOLDER / language / "nodeDefs.json").read_text(encoding="utf-8"))


def names(values, above=""):
    """The path of each text."""
    for key, value in values.items():
        yield from names(value, f"{above}/{key}") if isinstance(value, dict) else [f"{above}/{key}"]


@pytest.fixture(scope="module")
def english(pack):
    return locales.english()


def test_the_languages_are_english_and_chinese():
    assert LANGUAGES == ["en", "zh"]


def test_english_is_what_the_nodes_say(english):
    """`python -m scripts.locales` writes it."""
    assert texts("en") == english


def test_chinese_has_a_text_for_each_of_the_nodes(english):
    own = {"/DeltaConvDistill/inputs/kernel_sizes/tooltip"}  # which has braces in English
    assert set(names(texts("zh"))) == set(names(english)) | own


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_text_holds_what_the_frontend_would_read_as_syntax(language):
    assert [text for text in leaves(texts(language)) if set(text) & set(locales.SYNTAX)] == []


def leaves(values):
    for value in values.values():
        yield from leaves(value) if isinstance(value, dict) else [value]
