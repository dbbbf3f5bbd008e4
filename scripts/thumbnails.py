"""Draws the thumbnails under which ComfyUI's list of templates shows the workflows.

    python -m scripts.thumbnails [--output FOLDER] [--run]

Small drawings of what a workflow does, for those that need a model of the user's; they need matplotlib. With
--run, the others too, from what they give in a real ComfyUI server: that takes some minutes.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image

from deltaconv_core.sites import ARCHITECTURES, Level, Transformer

from . import workflow
from .comfy_server import ComfyServer

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
    drawing.box(60, 190, 125, 125, DELTACONV, "512")
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


def benchmark() -> Drawing:
    drawing = Drawing("Benchmark", "of your model, here")
    for y, width, color, name in ((130, 480, ATTENTION, "attention"), (230, 300, DELTACONV, "ΔConv")):
        drawing.bar(60, y, width, 80, color)
        drawing.text(60 + width / 2, y + 40, name)
    drawing.arrow((60, 345), (580, 345))
    drawing.text(560, 375, "time", size=28)
    return drawing


def conversion() -> Drawing:
    drawing = Drawing("Convert", "in minutes, untrained")
    for x, heights, shade in ((50, (220, 150, 60), ATTENTION), (350, (90, 80, 60), DELTACONV)):
        for i, height in enumerate(heights):
            drawing.bar(x + 80 * i, 360 - height, 65, height, ATTENTION if i == 2 else shade)
    drawing.arrow((285, 300), (340, 300))
    return drawing


def joint(title: str) -> Drawing:
    """What the attention of text and image becomes: text as it was, the picture by fewer landmarks."""
    drawing = Drawing(title, "untrained, 2048 × 2048")
    for x, side, shade in ((125, 8, ATTENTION), (445, 4, DELTACONV)):
        size = 152 / side
        for i in range(side * side):
            left, top = x + i % side * size, 150 + i // side * size
            drawing.bar(left + 0.06 * size, top + 0.06 * size, 0.88 * size, 0.88 * size, shade)
        for line, width in enumerate((70, 50, 62)):
            drawing.bar(x - 85, 175 + 40 * line, width, 18, INK)
    drawing.arrow((290, 225), (345, 225))
    drawing.text(160, 340, "attention", size=28)
    drawing.text(480, 340, "joint mixers", size=28)
    return drawing


DRAWINGS: dict[str, Callable[[], Drawing]] = {
    "sd15_text_to_image": lambda: network("sd15", "SD 1.5", 512),
    "sdxl_text_to_image": lambda: network("sdxl", "SDXL", 1024),
    "pixart_sigma_text_to_image": lambda: network("pixart_sigma", "PixArt-Σ", 1024),
    "sd15_hires_fix_2048": second_pass,
    "sd15_attention_first": attention_first,
    "sd15_two_weights": two_weights,
    "sd15_distill": distillation,
    "z_image_turbo_2048": lambda: joint("Z-Image-Turbo"),
    "flux1_dev_2048": lambda: joint("FLUX.1 dev"),
    "5_benchmark": benchmark,
    "6_convert_demo": conversion,
}


#: Workflows of the demo model, and the node whose picture is the thumbnail.
SHOWN = {
    "1_start_here": "DeltaConvCompare",
    "2_distill_demo": "DeltaConvCompare",
    "3_attention_locality": "DeltaConvLocality",
    "4_neighborhood_and_deltaconv": "DeltaConvCompare",
}


def from_runs(output: Path) -> None:
    """Runs the demo model's workflows, two pictures a batch, and keeps what their nodes show."""
    with ComfyServer() as server:
        for name, kind in SHOWN.items():
            prompt = workflow.to_prompt(workflow.load(workflow.FOLDER / f"{name}.json"), server.object_info())
            for node in prompt.values():
                if name == "1_start_here" and "batch_size" in node["inputs"]:
                    node["inputs"]["batch_size"] = 2
            outputs = server.run(prompt)
            shown = [outputs[key]["images"][0] for key, node in prompt.items() if node["class_type"] == kind]
            with Image.open(io.BytesIO(server.view(shown[0]))) as picture:
                fit(picture.convert("RGB")).save(output / f"{name}.jpg", quality=88, optimize=True)


def fit(picture: Image.Image) -> Image.Image:
    """The picture's upper part, as wide as a thumbnail."""
    scaled = picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS)
    return scaled.crop((0, 0, WIDTH, min(scaled.height, HEIGHT)))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    options.add_argument("--output", type=Path, default=workflow.FOLDER, help="where they go")
    options.add_argument("--run", action="store_true", help="those of the demo model too")
    given = options.parse_args()
    output = given.output
    for name, draw in DRAWINGS.items():
        draw().save(output / f"{name}.jpg")
    if given.run:
        from_runs(output)


if __name__ == "__main__":
    main()
