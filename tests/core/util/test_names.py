"""Names of files that every system takes."""

from __future__ import annotations

import pytest

from deltaconv_core.util.names import LONGEST_NAME, is_device, why_not


@pytest.mark.parametrize(
    "name",
    ["mine", "Mein Stil", "con_1", "console", "nulls", "a.b", "com", "com10", "ä" * 100, "日本語", "x'(1)!"],
)
def test_ordinary_names(name):
    assert why_not(name) == "" and not is_device(name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *(
            (name, "device")
            for name in ("con", "NUL", "nul.txt", "Aux.a.b", "com1", "LPT9.x", "com¹", "conin$", "prn .x")
        ),
        *((name, "dot") for name in (".x", ".", "..", "x.", "x..")),
        *(
            (name, "empty, and not begin or end with a space")
            for name in ("", " ", " x", "x ", "x\n", "\u3000x")
        ),
        *((f"a{c}b", "may not hold") for c in '<>:"|?*\\\0\n\t\x7f\x9f\ud800\udfff\u202e\u200b\ufeff'),
        ("x" * (LONGEST_NAME + 1), f"{LONGEST_NAME} bytes, and this one has {LONGEST_NAME + 1}"),
        ("ä" * (LONGEST_NAME // 2 + 1), "bytes"),
    ],
)
def test_names_that_some_system_refuses(name, reason):
    assert reason in why_not(name)
    why_not(name).encode()
