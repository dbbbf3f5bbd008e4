"""One idea, one name: what the modules of the core and the nodes define, and what they are called."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
FILES = [file for room in ("deltaconv_core", "nodes") for file in sorted((REPOSITORY / room).rglob("*.py"))]
HOSTS = ("deltaconv_core/diffusers/", "nodes/host/")

SAME = {
    "log": "a module's logger",
    "say": "a module's logger that says a thing once",
    "known": "what a process remembers (docs/environment.md)",
    "T": "a type variable",
    "add_arguments": "a command's options",
    "run": "what a command does",
    "download": "brings the rest of a file, over https or from the Hub",
    "INK": "color of the writing in a picture",
    "PAPER": "color behind it",
    "LEGEND": "what stands below a table",
    "PATIENCE": "seconds to wait for another process",
    "NEWTON_STEPS": "stated by the reference, which shares nothing with what is compared with it",
    "RIDGE": "the same",
    "cells_of": "the same",
    "depthwise_gate": "a step of the block, by Triton and on tensor cores",
    "BACKEND": "the one that a package of kernels offers to `choose`",
    "why_not": "the reason why something does not fit, as a clause",
}
"""By name, the one idea for which it stands in several places."""
SAME_FILES = {
    "distill": "the command, the node",
    "convert_model": "the command, the node",
    "conversion": "what hosts of a conversion share, and each host's part",
    "locality": "the command, the node, the pass through a pipeline",
    "neighborhood": "the mixer, the node, its patch",
    "base_weights": "which differ from a MODEL's, and putting them on in either host",
    "report": "its sentences, and showing it in ComfyUI",
    "session": "what hosts of a distillation share, and ComfyUI's part",
    "table": "figures of a room as Markdown",
    "spec": "of a mixer",
    "module": "of a mixer",
    "reference": "of a mixer",
    "flops": "of a mixer",
}


def names(file: Path) -> Iterator[str]:
    """The public ones that a module defines at its top."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found = [node.name]
        else:
            targets = [getattr(node, "target", None), *getattr(node, "targets", ())]
            found = [
                n.id for target in targets if target for n in ast.walk(target) if isinstance(n, ast.Name)
            ]
        yield from {name for name in found if not name.startswith("_")}


def twins(places: list[str]) -> bool:
    """Whether one is for diffusers and one for ComfyUI."""
    return len(places) == 2 and all(p.startswith(host) for p, host in zip(places, HOSTS, strict=True))


def test_no_public_name_has_two_meanings():
    places = defaultdict(list)
    for file in FILES:
        for name in names(file):
            places[name].append(file.relative_to(REPOSITORY).as_posix())
    several = {name: files for name, files in places.items() if len(files) > 1}
    assert {name: files for name, files in several.items() if not twins(files) and name not in SAME} == {}
    assert SAME.keys() - several.keys() == set()  # the list has only what is needed


def test_no_two_files_of_one_name_are_about_two_things():
    places = defaultdict(list)
    for file in FILES:
        places[file.stem].append(file.relative_to(REPOSITORY).as_posix())
    del places["__init__"]
    several = {name: files for name, files in places.items() if len(files) > 1}
    assert {name: files for name, files in several.items() if not twins(files)}.keys() == SAME_FILES.keys()
