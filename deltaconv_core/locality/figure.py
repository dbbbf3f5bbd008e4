"""The paper's figures 2, 4 and 5 for one model, in one picture: curves, receptive fields, average maps.

Dark, with large letters: ComfyUI shows it at half its size or less, mostly on a dark page.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..errors import DeltaConvError
from ..sites import short_name
from .recommend import Recommendation
from .result import THRESHOLD, LayerLocality

WIDTH, DPI = 1024, 100
PAPER, INK, FAINT, LINES, ACCENT = "#1b1d23", "#e8eaf0", "#6b7280", "#343843", "#ffb454"
MAPS, MAPS_A_ROW = 24, 8
MAP_RADIUS = 12  # tokens shown to each side of the query
BAR_NAMES = 30  # with more layers, not every bar is named


def check_matplotlib() -> None:
    """For those who draw after long work.

    Raises:
        DeltaConvError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise DeltaConvError("drawing needs matplotlib: pip install matplotlib") from None


def draw_figure(layers: Sequence[LayerLocality], advice: Recommendation, title: str) -> NDArray[np.uint8]:
    """The picture, (height, 1024, 3) uint8.

    Args:
        layers: in the order of the network.
        advice: its kernel sizes are marked.
        title: above everything.

    Raises:
        DeltaConvError: no layers, or matplotlib is not installed.
    """
    canvas = _canvas(layers, advice, title)
    canvas.draw()
    picture: NDArray[np.uint8] = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    return picture


def save(path: Path, layers: Sequence[LayerLocality], advice: Recommendation, title: str) -> None:
    """Writes `draw`'s picture as PNG."""
    _canvas(layers, advice, title).print_png(path)


def _canvas(layers: Sequence[LayerLocality], advice: Recommendation, title: str) -> Any:
    if not layers:
        raise DeltaConvError("expected at least one layer to draw")
    check_matplotlib()
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = _some(layers, MAPS)
    map_rows = -(-len(shown) // MAPS_A_ROW)
    columns = max(5, -(-len(shown) // map_rows))
    # Pixels from top to bottom: title, curves, gap, bars, their names and a gap, maps, border.
    parts = [105, 300, 110, 210, 160 if _turned(layers) else 100, map_rows * 1080 // columns, 20]
    figure = Figure(figsize=(WIDTH / DPI, sum(parts) / DPI), dpi=DPI, facecolor=PAPER)
    canvas = FigureCanvasAgg(figure)
    size = min(17.0, 1100 / max(1, len(title)))  # so that a long title stays within the page
    figure.text(0.02, 1 - 18 / sum(parts), title, va="top", color=INK, fontsize=size, fontweight="bold")
    at = figure.add_gridspec(
        len(parts), 1, height_ratios=parts, left=0.075, right=0.985, top=1, bottom=0, hspace=0
    )
    colors = mpl.colormaps["turbo"](np.linspace(0.08, 0.92, len(layers)))
    left, right = cast(Any, at[1].subgridspec(1, 2, wspace=0.12).subplots(sharey=True))
    _curves(left, [layer.mass for layer in layers], colors, "attention in a K × K window")
    _curves(right, [layer.high for layer in layers], colors, "its high-frequency part")
    right.axhline(THRESHOLD, color=ACCENT, linewidth=1.5, linestyle="--")
    _bars(figure.add_subplot(at[3]), layers, advice, colors)
    axes = at[5].subgridspec(map_rows, columns, wspace=0.08, hspace=0.25).subplots(squeeze=False)
    _maps(figure.add_subplot(at[5]), axes.flatten(), shown, len(layers), advice)
    return canvas


def _dress(axis: Any, title: str, **more: Any) -> None:
    """Colors, letters and grid; nothing global, so that other drawings in the process stay as they are."""
    axis.set_facecolor(PAPER)
    axis.set_title(title, color=INK, fontsize=15, **more)
    axis.tick_params(colors=INK, labelsize=13)
    axis.xaxis.label.set(color=INK, fontsize=13)
    axis.grid(True, color=LINES)
    axis.set_axisbelow(True)
    for side, spine in axis.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=FAINT)


def _curves(axis: Any, curves: Sequence[Any], colors: Any, title: str) -> None:
    """Figures 2 and 4: one line for each layer."""
    for curve, color in zip(curves, colors, strict=True):
        kernel_sizes = 2 * np.arange(len(curve)) + 1
        axis.plot(kernel_sizes, curve.numpy(), color=color, linewidth=2 if len(curves) <= MAPS else 1)
    widest = 2 * max(map(len, curves)) - 1
    ticks = [k for k in (1, 3, 5, 9, 17, 33, 65, 129, 257, 513) if k <= widest]
    axis.set_xscale("log")
    axis.set_xticks(ticks, labels=[str(k) for k in ticks])
    axis.minorticks_off()
    axis.set(xlim=(1, max(3, widest)), ylim=(0, 1.02), xlabel="K in tokens")
    _dress(axis, title)


def _bars(axis: Any, layers: Sequence[LayerLocality], advice: Recommendation, colors: Any) -> None:
    """Effective receptive fields; the bar's color is that of the layer's curve. What sinks add is pale."""
    at = np.arange(len(layers))
    without = [min(layer.erf, layer.erf_without_sinks) for layer in layers]
    axis.bar(at, [layer.erf for layer in layers], color=colors, width=0.8, alpha=0.35)
    axis.bar(at, without, color=colors, width=0.8)
    chosen = [advice.kernel_sizes.get(layer.site, np.nan) for layer in layers]
    size = 9 if len(layers) <= BAR_NAMES else 6
    axis.plot(at, chosen, "D", color=INK, markeredgecolor=PAPER, markersize=size)
    pale = ", pale: by sinks" if any(layer.erf > k for layer, k in zip(layers, without, strict=True)) else ""
    mark = ", ◆ recommended K" if advice.kernel_sizes else ""
    if advice.kernel_sizes and advice.skip:
        alone = [i for i, layer in enumerate(layers) if layer.site in advice.skip]
        axis.plot(
            alone, [without[i] / 2 for i in alone], "X", color=INK, markeredgecolor=PAPER, markersize=size
        )
        mark += ", ✖ none"
    _dress(axis, f"effective receptive field in tokens{pale}{mark}")
    every = -(-len(layers) // BAR_NAMES)
    names = [short_name(layer.site) for layer in layers]
    axis.set_xticks(at[::every], labels=names[::every], rotation=90 if _turned(layers) else 0, fontsize=12)
    axis.set(xlim=(-0.6, len(layers) - 0.4), ylim=(0, None))
    axis.grid(axis="x", visible=False)


def _turned(layers: Sequence[LayerLocality]) -> bool:
    """Whether the names under the bars have to stand upright."""
    return len(layers) * max(len(short_name(layer.site)) for layer in layers) > 90


def _maps(whole: Any, axes: Any, shown: Sequence[LayerLocality], count: int, advice: Recommendation) -> None:
    """Figure 5: average maps around the query."""
    whole.set_axis_off()
    some = f", {len(shown)} of {count} layers" if len(shown) < count else ""
    frame = ", framed: recommended K" if advice.kernel_sizes else ""
    _dress(whole, f"average map around the query{frame}{some}", pad=26)
    for axis in axes:
        axis.set_axis_off()
    for axis, layer in zip(axes, shown, strict=False):
        _map(axis, layer, advice.kernel_sizes.get(layer.site))


def _map(axis: Any, layer: LayerLocality, k: int | None) -> None:
    """The map near the query, as bright as its brightest place."""
    height, width = layer.around.shape
    y, x = height // 2, width // 2
    up, side = min(y, MAP_RADIUS), min(x, MAP_RADIUS)
    part = layer.around[y - up : y + up + 1, x - side : x + side + 1].numpy()
    extent = (-side - 0.5, side + 0.5, up + 0.5, -up - 0.5)
    axis.imshow(np.sqrt(part / part.max()), cmap="magma", vmin=0, vmax=1, extent=extent)
    if k is not None:
        axis.add_patch(_frame(k))
    axis.set(xlim=extent[:2], ylim=extent[2:])
    axis.set_title(short_name(layer.site), color=INK, fontsize=12, pad=3)


def _frame(k: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((-k / 2, -k / 2), k, k, fill=False, edgecolor=INK, linewidth=1.5)


def _some(layers: Sequence[LayerLocality], most: int) -> list[LayerLocality]:
    """All, or so many at equal distances, the first and the last among them."""
    if len(layers) <= most:
        return list(layers)
    return [layers[round(i * (len(layers) - 1) / (most - 1))] for i in range(most)]
