"""Short texts drawn into pictures; needs Pillow."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import ImageDraw, ImageFont


def line_height(size: int) -> int:
    """Pixels from the top of a line of this font size to the top of the next."""
    return -(-size * 13 // 10)


def write(
    draw: ImageDraw.ImageDraw, x: float, y: float, parts: Sequence[tuple[str, str]], size: int
) -> float:
    """Writes texts with their colors one after the other; returns where the last one ends.

    Pillow's own font has no Δ, so that one is drawn.

    Args:
        draw: of the picture.
        x, y: the first text's upper left corner, in pixels.
        parts: (text, color) each.
        size: of the font, in pixels.
    """
    font = ImageFont.load_default(size)
    _, top, _, bottom = font.getbbox("H")
    for text, color in parts:
        for index, part in enumerate(text.split("Δ")):
            if index:
                tall, foot = bottom - top, y + bottom - 1
                corners = [(x + 1, foot), (x + 1 + tall / 2, y + top), (x + 1 + tall, foot)]
                draw.polygon(corners, outline=color, width=max(1, size // 10))
                x += tall + 3
            draw.text((x, y), part, color, font)
            x += font.getlength(part)
        x += font.getlength(" ")
    return x
