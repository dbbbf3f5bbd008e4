"""Pipelines from other people's folders: what diffusers would do on a folder's word is looked at first.

`model_index.json` names the module that each part comes from, and diffusers imports it; versions before 0.38
also run Python files of the folder, even ones that the index does not name (`None.py`, `unet/diffusers.py`).
Weights may be split over files that an index names, pickles too, and adapters bring files of their own.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import DeltaConvError
from ..util.foreign_json import read_json
from ..util.text import quoted
from .joint import JOINT_FAMILIES
from .sites import network_of

INDEX = "model_index.json"
LIBRARIES = ("diffusers", "transformers")
ONLY_SAFETENSORS: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
ADAPTER = "adapter_config.json"
NO_VOCABULARY = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}


def read_index(folder: Path) -> dict[str, Any]:
    """What `model_index.json` says, once nothing in the folder can make diffusers run code or open pickles.

    Raises:
        DeltaConvError: no such folder or index, or one that asks for more than weights and configurations.
    """
    if not os.path.isfile(folder / INDEX):
        raise DeltaConvError(
            f"expected the folder of a diffusers pipeline, with a {INDEX}; there is none in {folder}"
        )
    with loading(folder):
        index = read_json(folder / INDEX)
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise DeltaConvError(
            f"diffusers cannot load {folder}: expected its {INDEX} to name a class of diffusers as "
            f"_class_name, got {quoted(index, 200)}; get the folder again"
        )
    with loading(folder):
        for part, named in index.items():
            if isinstance(named, list):
                _check_part(folder, part, named)
        _check_files(folder)
    return index


def load_pipeline(folder: Path, dtype: torch.dtype, variant: str | None, **parts: Any) -> Any:
    """The pipeline of a folder that `read_index` has taken.

    Args:
        folder: with the index.
        dtype: of the weights.
        variant: which of the weights, such as "fp16".
        parts: loaded already, or None to leave them out.

    Raises:
        DeltaConvError: see `check_vocabularies`.
    """
    check_vocabularies(folder, read_json(folder / INDEX), parts)
    pipelines: Any = importlib.import_module("diffusers").DiffusionPipeline
    options = ONLY_SAFETENSORS | ({"variant": variant} if variant else {})
    return pipelines.from_pretrained(folder, **dtype_argument(dtype), **parts, **options)


def check_vocabularies(folder: Path, index: dict[str, Any], given: Collection[str]) -> None:
    """transformers makes tokenizers without a vocabulary, which fail at the first prompt.

    Args:
        folder, index: of the pipeline, and what `read_index` says.
        given: parts that are not taken from the folder.

    Raises:
        DeltaConvError: a tokenizer without a vocabulary.
    """
    for part, named in index.items():
        if part in given or not isinstance(named, list) or "Tokenizer" not in str(named[-1]):
            continue
        files = {file.name for file in (folder / part).iterdir()} if (folder / part).is_dir() else set()
        if not files - NO_VOCABULARY:
            raise DeltaConvError(
                f"there is no vocabulary in {folder / part}, so no prompt can be read; get the folder again, "
                f"with all files of {part}"
            )


def load_joint(folder: Path, dtype: torch.dtype, variant: str | None) -> Any:
    """The pipeline of a folder whose attention is of text and image together; None for another kind.

    Args:
        folder, dtype, variant: as for `load_pipeline`.

    Raises:
        DeltaConvError: a folder that cannot be loaded.
    """
    named = read_index(folder).get("transformer")
    if not isinstance(named, list) or named[-1] not in JOINT_FAMILIES:
        return None
    with loading(folder):
        pipeline = load_pipeline(folder, dtype, variant)
    pipeline.set_progress_bar_config(disable=True)
    network_of(pipeline).eval().requires_grad_(False)
    return pipeline


@contextmanager
def loading(path: Path, with_what: str = "") -> Iterator[None]:
    """Whatever goes wrong while diffusers opens a model is one error that names it: diffusers raises many."""
    try:
        yield
    except DeltaConvError:
        raise
    except Exception as error:
        raise DeltaConvError(
            f"diffusers cannot load {path}{with_what}: {error}; check that it is whole, and that this "
            "version of diffusers knows it"
        ) from error


def dtype_argument(dtype: torch.dtype) -> dict[str, Any]:
    """float32 is what diffusers loads unasked; newer versions warn of this name, older know no other."""
    return {} if dtype == torch.float32 else {"torch_dtype": dtype}


def _check_part(folder: Path, part: str, named: list[Any]) -> None:
    """Refuses a part from anywhere but diffusers (its own pipelines' modules too) and transformers."""
    if named == [None, None]:
        return
    library, name = named if len(named) == 2 else (None, None)
    known = library in LIBRARIES or _is_module_of_diffusers(library)
    # Auto classes go by the part's own configuration, which may name code.
    if not known or not isinstance(name, str) or (library == "transformers" and name.startswith("Auto")):
        raise DeltaConvError(
            f"diffusers cannot load {folder}: its {INDEX} wants {quoted(part)} from {quoted(named, 200)}; "
            f"parts are loaded from {' and '.join(LIBRARIES)} alone, by their own classes, because anything "
            "else can run code"
        )


def _is_module_of_diffusers(name: object) -> bool:
    if not isinstance(name, str) or not name.isidentifier():
        return False
    pipelines: Any = importlib.import_module("diffusers.pipelines")
    return name in dir(pipelines) and hasattr(getattr(pipelines, name), "__path__")


def _check_files(folder: Path) -> None:
    for file in _files(folder):
        name = file.name.lower()
        if name.endswith(".py"):
            raise DeltaConvError(
                f"{file} is code, which diffusers may run when it opens the folder; nothing but weights and "
                "configurations is opened: take the file away if the model does not need it"
            )
        if name == ADAPTER:
            raise DeltaConvError(
                f"{file} brings an adapter, which is not opened; merge it into the weights, or take the "
                "file away"
            )
        if ".safetensors.index" in name and name.endswith(".json"):
            _check_shards(file)


def _files(folder: Path) -> Iterator[Path]:
    """Those of the folder and of its parts."""
    for entry in sorted(folder.iterdir()):
        yield from sorted(entry.iterdir()) if entry.is_dir() else [entry]


def _check_shards(file: Path) -> None:
    with loading(file):
        shards = read_json(file)["weight_map"].values()
        wrong = [name for name in shards if not name.endswith(".safetensors") or Path(name).name != name]
    if wrong:
        raise DeltaConvError(
            f"{file} names {quoted(wrong[0])}; only safetensors files beside it are opened: get the model "
            "in that form"
        )
