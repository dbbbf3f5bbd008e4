"""Draws the thumbnails under which ComfyUI's list of templates shows the workflows.

    python -m scripts.thumbnails [--output FOLDER]

Small drawings of what a workflow does; they need matplotlib. Those of 1_start_here and
2_distill_demo are none of them: they show what those workflows gave.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from deltaconv_core.sites import ARCHITECTURES, Level, Transformer

from .workflow import FOLDER

WIDTH, HEIGHT = 640, 480
PAPER, INK, QUIET = "#f4f4f4", "#222222", "#bdbdbd"
DELTACONV, ATTENTION = "#e0a030", "#6da174"


class Drawing:
    """A page on which lengths are pixels and y grows downwards."""

    def __init__(self, title: str, caption: str) -> None:
        self.figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100, facecolor=PAPER)
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
        self.axes.axis("off")
        self.text(WIDTH / 2, 62, title, size=56, weight="bold")
        self.text(WIDTH / 2, 428, caption, size=37)

    def text(self, x: float, y: float, text: str, size: float = 34, weight: str = "normal") -> None:
        """Text around a point; the size is in pixels."""
        style = {"ha": "center", "va": "center", "fontsize": size * 0.72, "fontweight": weight}
        self.axes.text(x, y, text, color=INK, **style)

    def bar(self, x: float, y: float, width: float, height: float, color: str) -> None:
        self.axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="none"))

    def box(self, x: float, y: float, width: float, height: float, color: str, label: str) -> None:
        """A box with round corners and a word in it."""
        style = {"boxstyle": "round,pad=0,rounding_size=10", "facecolor": color, "edgecolor": "none"}
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, **style))
        self.text(x + width / 2, y + height / 2, label)

    def arrow(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        style = {"arrowstyle": "-|>", "mutation_scale": 26, "linewidth": 4, "color": INK}
        self.axes.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **style))

    def save(self, path: Path) -> None:
        FigureCanvasAgg(self.figure).print_jpg(path, pil_kwargs={"quality": 92, "optimize": True})


def network(architecture: str, title: str, size: int) -> Drawing:
    """The stages of a network as bars, small ones for coarse stages, colored where ΔConv stands."""
    drawing = Drawing(title, f"ΔConv, {size} × {size}")
    shape = ARCHITECTURES[architecture]
    if isinstance(shape, Transformer):
        bars(drawing, [(1.0, DELTACONV)] * shape.depth)
    else:
        down = [(1 - 0.2 * i, color(level)) for i, level in enumerate(shape.down)]
        up = [(1 - 0.2 * i, color(level)) for i, level in enumerate(reversed(shape.up))][::-1]
        bars(drawing, [*down, (1 - 0.2 * len(down), color(shape.mid)), *up])
    return drawing


def color(level: Level) -> str:
    return DELTACONV if level.depths else QUIET


def bars(drawing: Drawing, parts: Sequence[tuple[float, str]]) -> None:
    """Bars of the given heights (1: full) and colors, side by side around the middle of the page."""
    step = 520 / len(parts)
    for i, (height, shade) in enumerate(parts):
        drawing.bar(60 + (i + 0.14) * step, 245 - 115 * height, 0.72 * step, 230 * height, shade)


def second_pass() -> Drawing:
    drawing = Drawing("SD 1.5 at 2048", "ΔConv in both passes")
    drawing.box(60, 190, 125, 125, DELTACONV, "1024")
    drawing.arrow((205, 252), (295, 252))
    drawing.box(320, 120, 262, 262, DELTACONV, "2048")
    return drawing


def attention_first() -> Drawing:
    drawing = Drawing("Attention first", "then ΔConv")
    drawing.bar(50, 180, 180, 110, ATTENTION)
    drawing.bar(230, 180, 360, 110, DELTACONV)
    drawing.text(140, 235, "attention")
    drawing.text(410, 235, "ΔConv")
    drawing.text(105, 335, "noise")
    drawing.arrow((180, 335), (440, 335))
    drawing.text(525, 335, "picture")
    return drawing


def two_weights() -> Drawing:
    drawing = Drawing("Two weights", "one seed, two pictures")
    drawing.box(45, 205, 130, 90, QUIET, "seed")
    for y, name in ((120, "mjv5"), (270, "laion")):
        drawing.arrow((190, 250), (255, y + 55))
        drawing.box(270, y, 150, 110, DELTACONV, name)
        drawing.arrow((435, y + 55), (480, y + 55))
        drawing.bar(490, y, 110, 110, INK)
        drawing.bar(497, y + 7, 96, 96, "white")
    return drawing


def distillation() -> Drawing:
    drawing = Drawing("Distil SD 1.5", "ΔConv from your pictures")
    drawing.box(40, 195, 230, 110, ATTENTION, "attention")
    drawing.arrow((285, 250), (355, 250))
    drawing.box(370, 195, 230, 110, DELTACONV, "ΔConv")
    return drawing


DRAWINGS: dict[str, Callable[[], Drawing]] = {
    "sd15_text_to_image": lambda: network("sd15", "SD 1.5", 512),
    "sdxl_text_to_image": lambda: network("sdxl", "SDXL", 1024),
    "pixart_sigma_text_to_image": lambda: network("pixart_sigma", "PixArt-Σ", 1024),
    "sd15_hires_fix_2048": second_pass,
    "sd15_attention_first": attention_first,
    "sd15_two_weights": two_weights,
    "sd15_distill": distillation,
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    options.add_argument("--output", type=Path, default=FOLDER, help="where they go")
    output = options.parse_args().output
    for name, draw in DRAWINGS.items():
        draw().save(output / f"{name}.jpg")


if __name__ == "__main__":
    main()
