"""The sheet shows every picture, enlarged as a whole, at its place."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("PIL")

from PIL import Image, ImageDraw

from deltaconv_core.likeness import sheet
from deltaconv_core.util.lettering import line_height, write


def even(*levels, side=16):
    return torch.stack([torch.full((side, side, 3), level) for level in levels])


def test_pairs_stand_below_each_other():
    page = sheet.draw_sheet([("one", even(0, 1)), ("two", even(0.5, 0.25))], ["first", "second"])
    side, label = 192, line_height(15)
    assert page.width == 2 * sheet.BORDER + 2 * side + sheet.GAP
    down = 2 * label + side + sheet.GAP // 2
    for row, levels in enumerate([(0, 128), (255, 64)]):
        y = sheet.BORDER + row * (down + sheet.BORDER) + label
        for column, level in enumerate(levels):
            x = sheet.BORDER + column * (side + sheet.GAP)
            corners = (page.getpixel((x, y)), page.getpixel((x + side - 1, y + side - 1)))
            assert corners == ((level,) * 3,) * 2


def test_many_pairs_stand_side_by_side_too():
    columns = [("a", even(*[0.0] * 12)), ("b", even(*[1.0] * 12)), ("c", even(*[0.5] * 12))]
    page = sheet.draw_sheet(columns, ["x"] * 12)
    assert page.width == 3 * sheet.BORDER + 2 * (3 * 192 + 2 * sheet.GAP)


def test_no_sheet_is_wider_than_can_be_looked_at():
    page = sheet.draw_sheet([("a", even(0, side=3000)), ("b", even(1, side=3000))], ["x"])
    assert page.width == sheet.WIDEST


def test_a_delta_is_drawn_where_the_font_has_none():
    """Narrower than two letters, and the text goes on behind it."""
    page = Image.new("RGB", (200, 40), "white")
    draw = ImageDraw.Draw(page)
    ends = [write(draw, 0, 5, [(text, "black")], 20) for text in ("Conv", "ΔConv", "MMConv")]
    assert ends == sorted(ends)
    assert Image.new("RGB", (200, 40), "white").tobytes() != page.tobytes()
