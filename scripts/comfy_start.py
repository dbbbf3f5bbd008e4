"""Starts ComfyUI's main.py for `ComfyServer`: `python -m scripts.comfy_start <host> [ComfyUI arguments]`.

Differs from starting main.py directly in three ways: torchvision and torchaudio may lack their compiled
parts; the host's own extra_model_paths.yaml is left alone, because the server must not see models and nodes
from elsewhere; and when the program that started it goes away, however it ended, the server goes too.
"""

from __future__ import annotations

import importlib
import os
import runpy
import signal
import sys
import threading
from pathlib import Path

from .comfy_host import prepare_torchaudio, prepare_torchvision


def die_with_parent() -> None:
    """Standard input is a pipe that the parent holds open; its end means the parent is gone."""
    sys.stdin.buffer.read()
    if os.name == "posix":
        os.killpg(0, signal.SIGKILL)  # and whatever was started from here
    os._exit(1)


def ignore_own_model_paths(host: Path) -> None:
    """Skip `<host>/extra_model_paths.yaml`; files named with --extra-model-paths-config are still read."""
    importlib.import_module("comfy.options").enable_args_parsing()
    config = importlib.import_module("utils.extra_config")
    load = config.load_extra_path_config

    def load_others(path: str) -> None:
        if Path(path).resolve().parent != host.resolve():
            load(path)

    config.load_extra_path_config = load_others


if __name__ == "__main__":
    threading.Thread(target=die_with_parent, daemon=True).start()
    host = Path(sys.argv[1])
    prepare_torchvision()
    prepare_torchaudio()
    sys.argv = [str(host / "main.py"), *sys.argv[2:]]
    sys.path[0] = str(host)
    ignore_own_model_paths(host)
    runpy.run_path(sys.argv[0], run_name="__main__")
