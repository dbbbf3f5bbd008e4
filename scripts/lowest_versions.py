"""Runs the quick tests that meet other packages with the lowest versions that this project allows.

    .venv/bin/python -m scripts.lowest_versions

They are installed into an environment of their own, `.venv-lowest`; all else, torch included, is that of
`.venv`, which has to be there (`make setup`). They need wheels for this Python: 3.11 has all of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

from .comfy_host import REPOSITORY

ENVIRONMENT = REPOSITORY / ".venv-lowest"
EXTRAS = ("", "fetch", "diffusers", "train", "plot")
OF_THE_OTHER = ("ComfyUI-DeltaConv", "torch")
"""Not installed again: this project, and what takes gigabytes where there is no build for the CPU."""
MEET_TORCH = ("parity", "compile", "devices")
MEET_FILES = ("checkpoint", "fetch_hub", "hostile_files", "manifest")
TESTS = (
    "tests/diffusers",
    *(f"--ignore=tests/diffusers/test_{name}.py" for name in MEET_TORCH),
    *(f"tests/core/weights/test_{name}.py" for name in MEET_FILES),
)


def main() -> int:
    pins = lowest(requires("ComfyUI-DeltaConv") or [])
    print(f"==> The lowest versions: {', '.join(pins)}", flush=True)
    python = environment()
    options = ("--quiet", "--no-warn-conflicts", "--only-binary", ":all:")
    install = [python, "-m", "pip", "install", *options, *pins]
    for command in (install, [python, "-m", "pytest", "-q", "-m", "not slow", *TESTS]):
        if status := subprocess.run(command, cwd=REPOSITORY, check=False).returncode:
            return status
    return 0


def lowest(requirements: Iterable[str]) -> list[str]:
    """`name==version` for each requirement `name>=version` that this Python and machine have."""
    pins = {}
    for text in requirements:
        wanted = Requirement(text)
        if wanted.name in OF_THE_OTHER:
            continue
        if wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in EXTRAS):
            (floor,) = (one.version for one in wanted.specifier if one.operator == ">=")
            pins[wanted.name] = f"{wanted.name}=={floor}"
    return sorted(pins.values())


def environment() -> str:
    """The Python of the environment, made if need be, with the packages of this one behind its own."""
    venv.create(ENVIRONMENT, with_pip=True)
    python = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    own = sysconfig.get_path("purelib")
    its = sysconfig.get_path("purelib", vars={"base": str(ENVIRONMENT), "platbase": str(ENVIRONMENT)})
    Path(its, "behind.pth").write_text(f"{own}\n", encoding="utf-8")
    return str(python)


if __name__ == "__main__":
    sys.exit(main())
