"""A folder of weights in the manner of diffusers' `save_pretrained`, ready for the Hugging Face Hub.

    config.json                          architecture, specs and metadata, for people and tools
    diffusion_pytorch_model.safetensors  a checkpoint of its own, as `save_checkpoint` writes it
    README.md                            the model card

`load_checkpoint` reads the folder.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..errors import CheckpointError
from ..util.whole_file import replacing
from .checkpoint import CLASS_NAME, CONFIG, WEIGHTS, Checkpoint, header_of, save_checkpoint
from .model_card import model_card
from .safefile import Pathlike


def save_hub_folder(checkpoint: Checkpoint, folder: Pathlike) -> None:
    """Writes the folder; a kill leaves the whole of it or nothing.

    Args:
        checkpoint: what to write; `model_card` says which metadata matter.
        folder: one that does not exist, or is empty.

    Raises:
        CheckpointError: a folder with something in it, a place that cannot be written, or a checkpoint that
            `load_checkpoint` would refuse.
    """
    folder = Path(folder)
    check_new(folder)
    config = {"_class_name": CLASS_NAME} | header_of(checkpoint)
    try:
        with replacing(folder) as part:
            part.mkdir()
            save_checkpoint(checkpoint, part / WEIGHTS)
            text = json.dumps(config, indent=2, ensure_ascii=False)
            (part / CONFIG).write_text(text + "\n", encoding="utf-8")
            (part / "README.md").write_text(model_card(checkpoint, WEIGHTS), encoding="utf-8")
            if folder.exists():
                folder.rmdir()
    except OSError as error:
        raise CheckpointError(
            f"cannot write {folder} ({error}); choose another place or free some space"
        ) from error


def check_new(folder: Path) -> None:
    """Refuses a folder with something in it.

    Raises:
        CheckpointError: that one, or a file.
    """
    if os.path.lexists(folder) and not (os.path.isdir(folder) and not any(folder.iterdir())):
        raise CheckpointError(f"{folder} holds something already; name a new or empty folder")
