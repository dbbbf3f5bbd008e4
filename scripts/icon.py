"""Draws the icon and the banner of the ComfyUI registry.

python -m scripts.icon [--output FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

from deltaconv_core.util.lettering import write

from .comfy_host import REPOSITORY

NIGHT, AMBER, FAINT, PAPER = "#23252b", "#e0a030", "#3a3d46", "#f4f4f4"
FINE = 4  # drawn larger and shrunk, so that slanted edges are smooth


def icon(side: int = 400) -> Image.Image:
    """A Δ over the cells of a convolution's kernel."""
    size = side * FINE
    page = Image.new("RGB", (size, size), NIGHT)
    draw = ImageDraw.Draw(page)
    cell, gap = size * 22 // 100, size * 5 // 100
    first = (size - 3 * cell - 2 * gap) // 2
    for row in range(3):
        for column in range(3):
            x, y = (first + at * (cell + gap) for at in (column, row))
            draw.rounded_rectangle((x, y, x + cell, y + cell), cell // 6, FAINT)
    corners = [(0.5, 0.16), (0.85, 0.8), (0.15, 0.8)]
    points = [(x * size, y * size) for x, y in [*corners, *corners[:2]]]
    draw.line(points, AMBER, size // 11, joint="curve")
    return page.resize((side, side), Image.Resampling.LANCZOS)


def banner(width: int = 1344, height: int = 576) -> Image.Image:
    """The icon with the name and what it does."""
    page = Image.new("RGB", (width, height), NIGHT)
    page.paste(icon(height), (0, 0))
    draw = ImageDraw.Draw(page)
    write(draw, height + 20, height * 0.3, [("ΔConv", PAPER)], height // 5)
    for number, line in enumerate(("convolutions in place of", "self-attention, for ComfyUI")):
        write(draw, height + 24, height * (0.56 + 0.1 * number), [(line, AMBER)], height // 13)
    return page


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    options.add_argument("--output", type=Path, default=REPOSITORY / "docs", help="where they go")
    output = options.parse_args().output
    icon().save(output / "icon.png", optimize=True)
    banner().save(output / "banner.png", optimize=True)


if __name__ == "__main__":
    main()
