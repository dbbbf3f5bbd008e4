"""ComfyUI servers that have the tests' own nodes too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scripts.comfy_host import REPOSITORY
from scripts.comfy_server import ComfyServer

HERE = Path(__file__).parent


def server_with(nodes: str, folder: Path, **options: Any) -> ComfyServer:
    """A server, not yet started, with the nodes of a folder beside this file.

    Args:
        nodes: "plain_nodes", a small MODEL and what a sampler needs, or "stand_in_nodes", by which ComfyUI
            knows the models of `comfy_model_files`.
        folder: for the server's configuration.
        options: of `ComfyServer`.
    """
    config = folder / f"{nodes}.yaml"
    config.write_text(f"{nodes}:\n  base_path: {HERE}\n  custom_nodes: {nodes}\n")
    arguments = ["--extra-model-paths-config", str(config)]
    return ComfyServer(extra_args=arguments, environment={"PYTHONPATH": str(REPOSITORY)}, **options)
