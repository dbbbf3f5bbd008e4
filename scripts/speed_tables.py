"""Puts the figures of `benchmarks/results` into docs/speed.md, between two comments.

    python -m scripts.speed_tables [--check]

--check changes nothing, and exits with status 1 when the page is not what the results say.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from deltaconv_core.util.text import markdown

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- speed: begin, by scripts/speed_tables.py -->", "<!-- speed: end -->"
TITLES = {"sd15": "SD 1.5", "sdxl": "SDXL", "pixart_sigma": "PixArt-Σ"}
VARIANTS = (
    "ComfyUI's attention",
    "PyTorch attention",
    "HyperTile",
    "ToMe",
    "LinFusion",
    "ΔConv",
    "lean ΔConv",
)
BOUND = "no self-attention"
WIDTH = 125  # of a line
Json = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args()
    file = ROOT / "docs" / "speed.md"
    text = file.read_text(encoding="utf-8")
    wanted = with_tables(text, ROOT / "benchmarks" / "results")
    if text == wanted:
        return 0
    if args.check:
        print("docs/speed.md is not what benchmarks/results says: run python -m scripts.speed_tables")
        return 1
    file.write_text(wanted, encoding="utf-8")
    return 0


def with_tables(page: str, results: Path) -> str:
    """The page's text with the tables of a folder of results between the comments."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"docs/speed.md lacks the lines {BEGIN} and {END}")
    return "\n".join([f"{before}{BEGIN}", *tables(results), f"{END}{after}"])


def tables(results: Path) -> Iterator[str]:
    """The lines between the comments."""
    for file in sorted(results.glob("network_*.json")):
        figures = json.loads(file.read_text(encoding="utf-8"))
        rows = [row for row in figures["rows"] if "variants" in row]
        if rows:
            yield from ["", machine(figures), "", *network(rows)]
    for file in sorted(results.glob("paper_*.json"))[:1]:
        figures = json.loads(file.read_text(encoding="utf-8"))
        rows = [row for row in figures["rows"] if row["table"] == 1]
        if rows:
            yield from ["", *operations(rows)]
    yield ""


def machine(figures: Json) -> str:
    """What the table below says, and where it was measured."""
    cpu = re.sub(r"\((R|TM)\)| (CPU|Processor)\b.*", "", figures.get("cpu", ""))
    where = figures.get("gpu") or f"{figures['threads']} threads of an {cpu}"
    return textwrap.fill(
        f"`python -m benchmarks.network` on {where}, {figures['dtype']}, torch {figures['torch']}, ComfyUI "
        f"{figures['comfyui']}: the time of a forward pass in units of the same network's without any "
        "self-attention, which no replacement can undercut.",
        WIDTH,
    )


def network(rows: Iterable[Json]) -> list[str]:
    """A line for each architecture and size: the time of each variant in units of the bound."""
    lines = []
    for row in sorted(
        rows, key=lambda row: (list(TITLES).index(row["architecture"]), math.prod(row["size"]))
    ):
        bound = row["variants"][BOUND]["seconds"]
        line = {"model": TITLES[row["architecture"]], "size": "{}×{}".format(*row["size"])}
        for name in VARIANTS:
            seconds = row["variants"].get(name, {}).get("seconds")
            line[name] = "–" if seconds is None else f"{seconds / bound:.2f}×"
        lines.append(line)
    return markdown(lines)


def operations(rows: Iterable[Json]) -> list[str]:
    """How many times fewer operations ΔConv takes than attention."""
    lines = [
        {
            "picture": row["picture"],
            "attention": f"{row['attention'] / 1e9:,.0f}",
            "ΔConv": f"{row['ΔConv'] / 1e9:,.1f}",
            "attention / ΔConv": f"{row['attention'] / row['ΔConv']:,.0f}×",
            "lean ΔConv": f"{row['lean'] / 1e9:,.1f}",
            "attention / lean": f"{row['attention'] / row['lean']:,.0f}×",
        }
        for row in rows
    ]
    head = (
        "`python -m benchmarks.paper_tables`: GFLOP of one layer with 640 channels, K 9; attention as in the "
        "paper's table 1; the authors' block and the leaner one of new distillations as PyTorch counts them."
    )
    return [textwrap.fill(head, WIDTH), "", *markdown(lines)]


if __name__ == "__main__":
    sys.exit(main())
