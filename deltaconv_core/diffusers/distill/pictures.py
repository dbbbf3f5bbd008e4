"""The pictures in a folder, and their captions."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DeltaConvError
from ...sites.match import listing
from .buckets import Size

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
TABLE = "metadata.jsonl"
ORIENTATION = 0x0112  # EXIF
ON_ITS_SIDE = (5, 6, 7, 8)
DEEP = ("I", "F")  # modes of more than 8 bits, which PIL would cut off


@dataclass(frozen=True)
class Picture:
    """One picture to learn from.

    Args:
        path: its file.
        caption: what it shows.
        size: of the upright picture.
        digest: differs for every other content of the file.
    """

    path: Path
    caption: str
    size: Size
    digest: str


def find_pictures(folder: Path, column: str = "text") -> list[Picture]:
    """All pictures in a folder and the folders in it, in the order of their names.

    A caption is looked for in the `metadata.jsonl` of the picture's folder or of the next one above it, as
    the `datasets` library does: a JSON object a line, with `file_name` relative to that folder. Else in the
    text file beside the picture.

    Args:
        folder: to look in.
        column: of the captions in `metadata.jsonl`.

    Raises:
        DeltaConvError: no folder, no pictures, pictures without a caption, or files that cannot be read.
    """
    if not folder.is_dir():
        raise DeltaConvError(f"expected data to be a folder of pictures; there is no folder {folder}")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    captions = _tables(folder, column)
    if not files:
        raise DeltaConvError(
            f"there are no pictures in {folder}; pictures end with one of {', '.join(ENDINGS)}"
        )
    texts = {path: _caption(path, captions) for path in files}
    without = [str(path.relative_to(folder)) for path, text in texts.items() if text is None]
    if without:
        raise DeltaConvError(
            f"{len(without)} of {len(files)} pictures in {folder} have no caption: {listing(without)}; write "
            f"it to a .txt file of the same name, or to {TABLE}"
        )
    return [_look_at(path, text) for path, text in texts.items() if text is not None]


def open_picture(path: Path) -> Any:
    """The upright picture as PIL has it, in RGB; what is transparent becomes white.

    Raises:
        DeltaConvError: a file that is no whole picture, or has more than 8 bits a color.
    """
    with _reading(path) as image:
        from PIL import Image, ImageOps

        if image.mode.startswith(DEEP):
            raise DeltaConvError(
                f"{path} has more than 8 bits a color (mode {image.mode}); save it with 8 bits"
            )
        upright = ImageOps.exif_transpose(image)
        if upright.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in upright.info:
            upright = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
        return upright.convert("RGB")


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """An opened picture; whatever is wrong with the file becomes one error that names it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DeltaConvError(f"pictures need the package Pillow ({error}): pip install pillow") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                yield image
    except DeltaConvError:
        raise
    except Exception as error:  # PIL raises many kinds
        raise DeltaConvError(f"{path} is no picture that can be read ({error})") from error


def _look_at(path: Path, caption: str) -> Picture:
    with _reading(path) as image:
        height, width = image.height, image.width
        if image.getexif().get(ORIENTATION) in ON_ITS_SIDE:
            height, width = width, height
    return Picture(path, caption, (height, width), hashlib.sha256(path.read_bytes()).hexdigest())


def _caption(path: Path, captions: Mapping[str, str]) -> str | None:
    if (named := os.path.normpath(path)) in captions:
        return captions[named]
    file = path.with_suffix(".txt")
    if not file.is_file():
        return None
    try:
        return file.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DeltaConvError(f"the caption in {file} is no UTF-8 text ({error})") from error


def _tables(folder: Path, column: str) -> dict[str, str]:
    """Picture -> caption, of every table; those in folders further down count more."""
    captions: dict[str, str] = {}
    for table in sorted(folder.rglob(TABLE), key=lambda path: len(path.parts)):
        for number, row in _rows(table):
            name, caption = row.get("file_name"), row.get(column)
            if not isinstance(name, str) or not isinstance(caption, str):
                raise DeltaConvError(
                    f"{table}, line {number}: expected texts for file_name and {column}, got {row!r:.200}"
                )
            picture = table.parent / name
            if not picture.is_file():
                raise DeltaConvError(f"{table}, line {number}: there is no file {picture}")
            captions[os.path.normpath(picture)] = caption.strip()
    return captions


def _rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = table.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DeltaConvError(f"{table} is no UTF-8 text ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DeltaConvError(f"{table}, line {number} is no JSON ({error})") from error
        if not isinstance(row, dict):
            raise DeltaConvError(f"{table}, line {number}: expected an object, got {row!r:.200}")
        yield number, row
