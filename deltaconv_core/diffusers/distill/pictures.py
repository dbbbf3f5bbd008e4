"""The pictures in a folder, and their captions."""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DeltaConvError
from ...util.foreign_json import parse_json
from ...util.text import listing, quoted
from .buckets import PictureSize

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
"""PIL's names. PIL goes by a file's content and would start Ghostscript on PostScript that is called .png."""
NOT_READ = (".gif", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".tga", ".psd", ".ico", ".svg", ".raw", ".dng")
NOBODYS = (
    "__macosx", "@eadir", "@__thumb", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "lost+found",
    "system volume information",
)  # fmt: skip
"""Folders that systems, servers and archives make, in lower case; so are names that begin with a dot."""
TABLE = "metadata.jsonl"
ORIENTATION = 0x0112  # EXIF
ON_ITS_SIDE = (5, 6, 7, 8)
DEEP = ("I", "F")  # modes of more than 8 bits, which PIL would cut off

log = logging.getLogger(__name__)


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
    size: PictureSize
    digest: str


def find_pictures(
    folder: Path, column: str = "text", tell: Callable[[str], object] = log.warning
) -> list[Picture]:
    """All pictures in a folder and the folders in it, in the order of their names.

    A caption is looked for in the `metadata.jsonl` of the picture's folder or of the next one above it, as
    the `datasets` library does: a JSON object a line, with `file_name` relative to that folder. Else in the
    text file beside the picture.

    What systems put there (names that begin with a dot, `__MACOSX`, `@eaDir`, ...) is passed over.

    Args:
        folder: to look in.
        column: of the captions in `metadata.jsonl`.
        tell: called with a text when anything else that looks like a picture is left out.

    Raises:
        DeltaConvError: no folder, no pictures, pictures without a caption, or files that cannot be read.
    """
    if not os.path.isdir(folder):
        raise DeltaConvError(f"expected data to be a folder of pictures; there is no folder {folder}")
    files = _Files.of(folder)
    if files.left_out:
        tell(f"left out of {folder}: {'; '.join(files.left_out)}")
    captions = _tables(files.tables, column)
    if not files.pictures:
        raise DeltaConvError(
            f"there are no pictures in {folder}; pictures end with one of {', '.join(ENDINGS)}"
        )
    texts = {path: _caption(path, captions) for path in files.pictures}
    without = [path for path, text in texts.items() if text is None]
    if without:
        raise DeltaConvError(
            f"{len(without)} of {len(texts)} pictures in {folder} have no caption: "
            f"{listing([str(path.relative_to(folder)) for path in without])}; {_where_to_write(without)}"
        )
    return [_look_at(path, text) for path, text in texts.items() if text is not None]


@dataclass(frozen=True)
class _Files:
    """What lies in a folder and the folders in it.

    Args:
        pictures, tables: sorted; tables of folders further down come later.
        left_out: what looks like pictures and is not taken, a text for each reason.
    """

    pictures: list[Path]
    tables: list[Path]
    left_out: list[str]

    @classmethod
    def of(cls, folder: Path) -> _Files:
        files: list[Path] = []
        links: list[Path] = []
        for place, folders, names in os.walk(folder, onerror=_cannot_list):
            folders[:] = [name for name in folders if not _is_nobodys(name)]
            files += [Path(place, name) for name in names if not _is_nobodys(name)]
            links += [Path(place, name) for name in folders if os.path.islink(os.path.join(place, name))]
        tables = [path for path in files if path.name == TABLE]
        pictures = sorted(path for path in files if path.suffix.lower() in ENDINGS)
        if lost := [path for path in pictures if not os.path.isfile(path)]:
            raise DeltaConvError(
                f"cannot read {listing(map(str, lost))}: no file, or a link to one that is not there; take "
                "it away, or make its disk available"
            )
        others = [path for path in files if path.suffix.lower() in NOT_READ]
        reasons = {
            "{} in a format that is not read ({}); convert them to .png or .jpg": others,
            "{} linked folders ({}); name the folder itself as data": links,
        }
        left_out = [
            text.format(len(paths), listing(str(path.relative_to(folder)) for path in sorted(paths)))
            for text, paths in reasons.items()
            if paths
        ]
        return cls(pictures, sorted(tables, key=lambda path: len(path.parts)), left_out)


def _is_nobodys(name: str) -> bool:
    return name.startswith(".") or name.lower() in NOBODYS


def _cannot_list(error: OSError) -> None:
    raise DeltaConvError(
        f"cannot look into the folder {error.filename} ({error.strerror}); make it readable, or take it away"
    ) from error


def _where_to_write(without: list[Path]) -> str:
    """How pictures without a caption get one."""
    other = next((path.with_suffix(".caption") for path in without if _is_beside(path, ".caption")), None)
    if other is not None:
        return f"there is {other.name}, but captions are read from .txt files: rename the .caption files"
    return f"write it to a .txt file of the same name, or to {TABLE}"


def _is_beside(path: Path, ending: str) -> bool:
    return os.path.isfile(path.with_suffix(ending))


def open_picture(path: Path) -> Any:
    """The upright picture as PIL has it, in RGB; what is transparent becomes white.

    Raises:
        DeltaConvError: a file that is not a whole picture, or has more than 8 bits a color.
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
            with Image.open(path, formats=FORMATS) as image:
                yield image
    except DeltaConvError:
        raise
    except Exception as error:  # PIL raises many kinds
        raise DeltaConvError(
            f"{path} is not a picture that can be read ({error}); save it again, or take it away"
        ) from error


def _look_at(path: Path, caption: str) -> Picture:
    with _reading(path) as image:
        height, width = image.height, image.width
        if image.getexif().get(ORIENTATION) in ON_ITS_SIDE:
            height, width = width, height
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Picture(path, caption, (height, width), digest)


def _caption(path: Path, captions: Mapping[str, str]) -> str | None:
    if (named := os.path.normpath(path)) in captions:
        return captions[named]
    return _text(path.with_suffix(".txt")).strip() if _is_beside(path, ".txt") else None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DeltaConvError(f"{file} is not UTF-8 text ({error}); save it as UTF-8") from error
    except OSError as error:
        raise DeltaConvError(f"cannot read {file} ({error.strerror}); make it readable") from error


def _tables(tables: list[Path], column: str) -> dict[str, str]:
    """Picture -> caption, of every table; later ones count more."""
    captions: dict[str, str] = {}
    for table in tables:
        for number, row in _rows(table):
            name, caption = row.get("file_name"), row.get(column)
            if not isinstance(name, str) or not isinstance(caption, str):
                raise DeltaConvError(
                    f"{table}, line {number}: expected texts for file_name and {column}, got "
                    f"{quoted(row, 200)}"
                )
            picture = table.parent / name
            if not os.path.isfile(picture):
                raise DeltaConvError(
                    f"{table}, line {number}: there is no file {quoted(str(picture), 300)}; correct the "
                    "name, or delete the line"
                )
            captions[os.path.normpath(picture)] = caption.strip()
    return captions


def _rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_text(table).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise DeltaConvError(
                f"{table}, line {number} is not JSON ({error}); write one object a line"
            ) from error
        if not isinstance(row, dict):
            raise DeltaConvError(f"{table}, line {number}: expected an object, got {quoted(row, 200)}")
        yield number, row
