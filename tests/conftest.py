"""Fixtures that every room's tests share; `scripts/comfy_host.py` says which ComfyUI they use."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from scripts import comfy_host as host_finder
from scripts import workflow
from scripts.comfy_server import ComfyServer

# Equal runs give equal pictures, on a busy machine too; nobody's cache is read or written.
os.environ["DELTACONV_TUNE"] = "0"

# A run that a shell put into the background ignores Ctrl-C, and so would every program that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def comfy_host() -> Path:
    """ComfyUI's folder; ComfyUI can be imported in this process (CPU, folders in a temporary directory)."""
    return host_finder.import_comfy()


@pytest.fixture(scope="session")
def pack(comfy_host: Path) -> ModuleType:
    """This repository as the package ComfyUI makes; inside it: `import_module(".x", pack.__name__)`."""
    return host_finder.import_pack()


@pytest.fixture(scope="session")
def comfy_server() -> Iterator[ComfyServer]:
    """A running ComfyUI server with this repository in its custom_nodes, shared by all tests of the run."""
    with ComfyServer() as server:
        yield server


@pytest.fixture(scope="session")
def server_with_models(comfy_server: ComfyServer) -> ComfyServer:
    """The same server with an empty file for each model, and an empty folder for each one of pictures, that a
    workflow asks for, so that it lists them."""
    for file in workflow.FOLDER.glob("*.json"):
        saved = workflow.load(file)
        for folder in workflow.input_folders(saved):
            (comfy_server.base / "input" / folder).mkdir(exist_ok=True)
        for model in workflow.model_files(saved):
            path = comfy_server.base / "models" / model["directory"] / model["name"]
            path.parent.mkdir(exist_ok=True)
            path.touch()
    return comfy_server
