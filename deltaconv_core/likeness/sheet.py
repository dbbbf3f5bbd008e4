"""A sheet that shows pairs of pictures side by side, labelled, with their differences; needs Pillow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..util.lettering import line_height, write

PAPER, INK = "#fbfaf7", "#222222"
GAP, BORDER = 8, 24
SMALLEST, WIDEST = 192, 4096


def draw_sheet(columns: Sequence[tuple[str, Tensor]], captions: Sequence[str]) -> Image.Image:
    """One row for each pair; where there are many, several rows side by side.

    Small pictures are enlarged pixel by pixel until their shorter side has at least 192 pixels; a sheet of
    more than 4096 pixels is shrunk to that.

    Args:
        columns: what stands above a column, and its pictures, (N, H, W, 3) in [0, 1].
        captions: what stands below a row, one for each of the N.
    """
    count, height, width, _ = columns[0][1].shape
    scale = max(1, -(-SMALLEST // min(height, width)))
    height, width = height * scale, width * scale
    size = max(15, width // 28)
    label = line_height(size)
    across = max(1, round((count / len(columns)) ** 0.5))
    row = len(columns) * (width + GAP) - GAP
    down = label + height + GAP // 2 + label
    rows = -(-count // across)
    page = Image.new("RGB", (BORDER + across * (row + BORDER), BORDER + rows * (down + BORDER)), PAPER)
    draw = ImageDraw.Draw(page)
    for index, caption in enumerate(captions):
        left = BORDER + index % across * (row + BORDER)
        top = BORDER + index // across * (down + BORDER)
        for number, (name, pictures) in enumerate(columns):
            x = left + number * (width + GAP)
            write(draw, x, top, [(name, INK)], size)
            picture = Image.fromarray(to_bytes(pictures[index]).numpy())
            page.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, top + label))
        write(draw, left, top + label + height + GAP // 2, [(caption, INK)], size)
    page.thumbnail((WIDEST, WIDEST))
    return page


def to_bytes(picture: Tensor) -> Tensor:
    """The nearest of 256 levels for values in [0, 1]."""
    return (picture.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8)
