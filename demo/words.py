"""The words that the demo model understands, and how a written prompt becomes one word per slot.

A prompt fills six slots (shape, colour, count, position, background, layout). A slot that the prompt leaves
open holds :data:`ANY`; the empty prompt leaves all of them open and serves as the unconditional prompt of
classifier-free guidance. The model's context is one embedding per slot, in the order of :data:`SLOTS`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

SLOTS: dict[str, tuple[str, ...]] = {
    "shape": ("circle", "square", "triangle", "diamond", "cross"),
    "color": ("red", "green", "blue", "yellow", "purple"),
    "count": ("one", "two", "three"),
    "position": ("left", "right", "top", "bottom", "center"),
    "background": ("white", "gray", "black"),
    "layout": ("plain", "mirror", "frame", "stripes", "pairs"),
}

#: An open slot: the picture may show anything there.
ANY = "any"

#: Every row of the embedding table: for each slot its words, then the slot's own :data:`ANY`.
VOCABULARY: tuple[tuple[str, str], ...] = tuple(
    (slot, word) for slot, words in SLOTS.items() for word in (*words, ANY)
)

_ROW = {entry: row for row, entry in enumerate(VOCABULARY)}
_SLOT_OF = {word: slot for slot, words in SLOTS.items() for word in words}
_FILLERS = frozenset(
    ["a", "an", "and", "at", "background", "in", "layout", "of", "on", "picture", "side", "the", "to", "with"]
)
_SPELLINGS = {
    "grey": "gray",
    "centre": "center",
    "middle": "center",
    "crosses": "cross",
    "mirrored": "mirror",
}
_SPELLINGS |= {"1": "one", "2": "two", "3": "three", "striped": "stripes", "framed": "frame", "pair": "pairs"}


class Prompt(NamedTuple):
    """One word per slot, :data:`ANY` where the slot is open."""

    shape: str = ANY
    color: str = ANY
    count: str = ANY
    position: str = ANY
    background: str = ANY
    layout: str = ANY

    def __str__(self) -> str:
        return " ".join(word for word in self if word != ANY)


def parse_prompt(text: str) -> Prompt:
    """Read a written prompt such as ``"two red circles on the left, white background, mirror"``.

    Order and filler words do not matter. Raises ``ValueError`` for a word that the model was not trained on
    and for two words that fill the same slot.
    """
    filled: dict[str, str] = {}
    for written in re.findall(r"[^\s,.;:]+", text.lower()):
        if written in _FILLERS:
            continue
        word = _SPELLINGS.get(written, written)
        if word not in _SLOT_OF and word.endswith("s"):
            word = word[:-1]
        if word not in _SLOT_OF:
            raise ValueError(f"the demo model does not know the word {written!r}. {known_words()}")
        slot = _SLOT_OF[word]
        if filled.setdefault(slot, word) != word:
            raise ValueError(f"{filled[slot]!r} and {word!r} both name the {slot}; use one of them")
    return Prompt(**filled)


def known_words() -> str:
    """One sentence that lists every word by slot."""
    return "It knows " + "; ".join(f"{slot}: {', '.join(words)}" for slot, words in SLOTS.items()) + "."


def token_rows(prompt: Prompt) -> list[int]:
    """Rows of the embedding table for ``prompt``, one per slot."""
    return [_ROW[slot, word] for slot, word in zip(SLOTS, prompt, strict=True)]
