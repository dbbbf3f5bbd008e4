"""docs/environment.md against the code."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import deltaconv_core

PACKAGE = Path(deltaconv_core.__file__).parent
PAGE = (Path(__file__).parents[2] / "docs" / "environment.md").read_text(encoding="utf-8")


def test_every_variable_that_is_read_is_on_the_page():
    code = {
        path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8")
        for path in PACKAGE.rglob("*.py")
    }
    read = {(name, path) for path, text in code.items() for name in re.findall(r'"(DELTACONV_\w+)"', text)}
    assert read == set(re.findall(r"^\| `(DELTACONV_\w+)` \|.*\| `(.+)` \|$", PAGE, re.MULTILINE))


def test_every_object_on_the_page_can_be_reset():
    paths = re.findall(r"^\| `(block|weights)\.([\w.]+)\.(\w+)` \|", PAGE, re.MULTILINE)
    assert len(paths) == 7
    for room, module, name in paths:
        if module != "ops.triton.tuning":  # imports triton, which may not be here
            found = getattr(import_module(f"deltaconv_core.{room}.{module}"), name)
            found.reset()
