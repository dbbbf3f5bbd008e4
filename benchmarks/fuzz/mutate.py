"""Values, texts and bytes with something wrong in them."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

DEEP = "\x00deep\x00"  # stands for a deeply nested list until the text is made
WORDS = (
    "", " ", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "con", "nul.txt", "x.", ".x",
    "\0", "a\0b", "\n", "\x1b[2J", "\x7f", "\u202e", "\ud800", "\udfff", "\ufeff", "٣", "𝔘",
    "é" * 130, "x" * 300, "y" * 5000, "*", "[", "[!", "-", "-all", "all", "down", "up_blocks.*",
    "%s", "{}", "None", "true", "1", "1e9", "NaN", "auto",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 255, 2**31, 2**63, 2**64, 10**400, -(10**400),
    0.5, -0.0, 1e308, 1e-320, float("inf"), float("-inf"), float("nan"),
    [], {}, [None], [[]], {"": None}, [1, 0.5], [0], [1.0] * 9, DEEP,
)  # fmt: skip


def value(random: Random) -> Any:
    """Something that was not expected."""
    kind = random.random()
    if kind < 0.4:
        return copy.deepcopy(random.choice(VALUES))
    if kind < 0.8:
        return word(random)
    return {word(random): value(random)} if kind < 0.9 else [value(random), value(random)]


def word(random: Random) -> str:
    """A text that is a bad name, number, pattern or path."""
    if random.random() < 0.7:
        return random.choice(WORDS)
    return "".join(
        chr(random.choice((32, 97, 128, 0x10000)) + random.randrange(96)) for _ in range(random.randrange(9))
    )


def changed(random: Random, whole: Any, times: int = 2) -> Any:
    """A copy of a JSON value with up to `times` places changed."""
    whole = copy.deepcopy(whole)
    for _ in range(random.randint(1, times)):
        places = [(whole, None)]
        while True:
            owner, key = places[-1]
            inner = owner if key is None else owner[key]
            keys = (
                list(inner)
                if isinstance(inner, dict)
                else range(len(inner))
                if isinstance(inner, list)
                else ()
            )
            if not keys or (key is not None and random.random() < 0.3):
                break
            places.append((inner, random.choice(list(keys))))
        owner, key = places[-1]
        if key is None:
            return value(random)
        _change(random, owner, key)
    return whole


def _change(random: Random, owner: Any, key: Any) -> None:
    what = random.random()
    if what < 0.55:
        owner[key] = value(random)
    elif what < 0.7:
        del owner[key]
    elif isinstance(owner, dict):
        owner[word(random)] = owner.pop(key) if what < 0.85 else value(random)
    else:
        again = copy.deepcopy(owner[key])
        owner.insert(random.randrange(len(owner) + 1), value(random) if what < 0.85 else again)


def text(random: Random, whole: Any) -> str:
    """A JSON value as text; deep lists are made deep."""
    deep = random.choice((20, 70, 300, 900, 50_000))
    return json.dumps(whole).replace(json.dumps(DEEP), "[" * deep + "]" * deep)


def damaged(random: Random, data: bytes) -> bytes:
    """Bytes that a disk, a program or somebody changed."""
    data = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at, length = random.randrange(len(data) + 1), random.choice((1, 1, 2, 8, 100))
        what = random.randrange(6)
        if what == 0:
            data[at : at + length] = random.randbytes(length)
        elif what == 1:
            del data[at:]
        elif what == 2:
            del data[at : at + length]
        elif what == 3:
            data[at:at] = data[: length * 10]
        elif what == 4 and at < len(data):
            data[at] ^= 1 << random.randrange(8)
        else:
            data[at:at] = random.choice((b"\0", b"\xff", b'"', b"[", b"{", b",", b"\n", b"%!PS", b"9" * 400))
    return bytes(data)
