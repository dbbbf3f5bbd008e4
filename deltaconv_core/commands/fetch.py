"""`fetch`: put published weights into the model folder, or list what there is."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from ..cli import printable
from ..errors import DeltaConvError
from ..weights.fetch import resolve
from ..weights.manifest import REPOSITORY, Manifest, Record, load_manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the name of the weights and the folder they go to."""
    parser.add_argument("name", metavar="NAME", nargs="?", help="weights to fetch, as --list shows them")
    parser.add_argument(
        "--folder",
        metavar="DIR",
        type=Path,
        default=default_folder(),
        help="model folder; its manifest.json, where there is one, adds to the list (default: %(default)s)",
    )
    parser.add_argument("--list", action="store_true", help="list all weights; opens no connection")


def run(options: argparse.Namespace) -> int:
    """Fetches and prints the path of the file, or prints the list."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    manifest = load_manifest(options.folder / "manifest.json")
    if options.list:
        return _print_list(manifest, options.folder)
    if options.name is None:
        raise DeltaConvError("expected the NAME of weights to fetch; --list shows them")
    try:
        print(resolve(manifest[options.name], options.folder))
    except KeyboardInterrupt:
        print("interrupted; what has arrived is kept and the next fetch resumes there")
        return 130
    return 0


def default_folder() -> Path:
    """ComfyUI's model folder when the repository lies in its custom_nodes, else one in the current folder."""
    if REPOSITORY.parent.name == "custom_nodes":
        return REPOSITORY.parents[1] / "models" / "deltaconv"
    return Path("models/deltaconv")


def _print_list(manifest: Manifest, folder: Path) -> int:
    for record in manifest:
        there = "here" if record.local_path(folder).is_file() else "to fetch"
        print(printable(f"{record.name}  [{there}]  {record.architecture}{_auto(record)}  {record.title}"))
        print(printable(f"    license: {record.license}. {record.note}"))
    return 0


def _auto(record: Record) -> str:
    return f" (auto for {', '.join(record.recommended_for)})" if record.recommended_for else ""
