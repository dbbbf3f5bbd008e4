"""Checks the types of `nodes/`: `python -m scripts.check_types`.

ComfyUI imports the repository as a package of whatever name its folder has, and `nodes` imports
`deltaconv_core` by way of that package. mypy wants a name that is an identifier, so it is shown the
repository under the name `extension`, by a link in its cache.
"""

from __future__ import annotations

import os
import subprocess
import sys

from .comfy_host import REPOSITORY

FOLDER = REPOSITORY / ".mypy_cache" / "as_comfyui_imports_it"


def main() -> int:
    """mypy's exit status."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    link = FOLDER / "extension"
    if not link.is_symlink() or link.resolve() != REPOSITORY:
        link.unlink(missing_ok=True)
        link.symlink_to(REPOSITORY, target_is_directory=True)
    command = [sys.executable, "-m", "mypy", "--config-file", str(REPOSITORY / "scripts" / "check_types.ini")]
    environment = {**os.environ, "MYPYPATH": str(FOLDER)}
    return subprocess.run(
        [*command, "-p", "extension.nodes"], cwd=FOLDER, env=environment, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
