"""What was found as text and as CSV: one row for each layer. The text is Markdown, and aligned."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..block.flops import attention_flops, block_flops
from ..block.spec import BlockSpec
from ..sites import short_name
from ..util.text import markdown
from .recommend import Recommendation
from .result import LayerLocality

LEGEND = """\
- ERF: effective receptive field, the smallest K whose K x K window holds 80 % of the high-frequency part;
  then its range over the timesteps, and without sinks.
- high: share of the attention in the high-frequency part.
- sinks: share on the first and on the last token.
- other, where there is any: share on tokens that are not of the image, such as text.
- near, flat, rest: attention as a part that decays with distance, a constant, and the error of that fit.
- K: recommended kernel size, - where the layer is better left alone.
- GFLOP: of attention, then of ΔConv; two for each multiply-add."""


def rows(layers: Iterable[LayerLocality], advice: Recommendation) -> list[dict[str, str]]:
    """The table, a dictionary for each layer with the same keys."""
    return [_row(layer, advice.kernel_sizes.get(layer.site)) for layer in layers]


def text(layers: Sequence[LayerLocality], advice: Recommendation) -> str:
    """The table with totals and a legend."""
    table = [{"layer": short_name(row.pop("site")), **row} for row in rows(layers, advice)]
    if not any(layer.outside for layer in layers):
        table = [{name: cell for name, cell in row.items() if name != "other"} for row in table]
    return "\n".join([*markdown(table), "", *_totals(layers, advice), *_accuracy(layers), "", LEGEND])


def write_csv(layers: Sequence[LayerLocality], advice: Recommendation, folder: Path) -> None:
    """Writes `layers.csv`, the table, and `curves.csv`, every curve at every K."""
    _write(folder / "layers.csv", rows(layers, advice))
    _write(folder / "curves.csv", [point for layer in layers for point in _curve(layer)])


def _row(layer: LayerLocality, k: int | None) -> dict[str, str]:
    fit = layer.components
    low, high = layer.erf_range
    return {
        "site": layer.site,
        "tokens": f"{layer.grid[0]}x{layer.grid[1]}",
        "C": str(layer.channels),
        "heads": str(layer.heads),
        "ERF": str(layer.erf),
        "range": f"{low}-{high}",
        "no sinks": str(layer.erf_without_sinks),
        "high": f"{layer.high_share:.1%}",
        "sinks": f"{layer.first:.1%} {layer.last:.1%}",
        "other": f"{layer.outside:.1%}",
        "near": f"{fit.local:.1%}",
        "flat": f"{fit.constant:.1%}",
        "rest": f"{fit.residual:.2f}",
        "K": "-" if k is None else str(k),
        "GFLOP": f"{attention_flops(layer.tokens, layer.channels) / 1e9:.3g}",
        "ΔConv": "-" if k is None else f"{_block(layer, k) / 1e9:.3g}",
    }


def _block(layer: LayerLocality, k: int) -> int:
    return block_flops(BlockSpec.lean(layer.channels, k), layer.grid)


def _totals(layers: Sequence[LayerLocality], advice: Recommendation) -> list[str]:
    if not advice.kernel_sizes:
        return []
    replaced = {
        layer: advice.kernel_sizes[layer.site] for layer in layers if layer.site in advice.kernel_sizes
    }
    before = sum(attention_flops(layer.tokens, layer.channels) for layer in layers)
    saved = sum(
        attention_flops(layer.tokens, layer.channels) - _block(layer, k) for layer, k in replaced.items()
    )
    parameters = sum(BlockSpec.lean(layer.channels, k).num_parameters for layer, k in replaced.items())
    return [
        f"Recommended: ΔConv in {len(replaced)} of {len(layers)} layers, {parameters / 1e6:.3g} M "
        f"parameters. Cost of all layers at this size, one picture and step: {before / 1e9:.4g} GFLOP now, "
        f"{(before - saved) / 1e9:.4g} then."
    ]


def _accuracy(layers: Iterable[LayerLocality]) -> list[str]:
    """What is not exact."""
    sampled = [layer for layer in layers if not layer.exact]
    if not sampled:
        return ["Every query was looked at."]
    error = max(layer.high_error.max().item() for layer in sampled)
    mass = max(layer.mass_error.max().item() for layer in sampled)
    return [
        f"In {len(sampled)} layers of very many tokens, {sampled[0].queries} queries drawn at random were "
        f"looked at; standard error of the attention in a window at most {mass:.2g}, of the high-frequency "
        f"part at most {error:.2g}."
    ]


def _curve(layer: LayerLocality) -> Iterable[dict[str, str]]:
    for r in range(len(layer.mass)):
        point = {"site": layer.site, "K": str(2 * r + 1)}
        for name in ("mass", "mass_error", "high", "high_error", "high_without_sinks"):
            point[name] = f"{getattr(layer, name)[r].item():.6g}"
        yield point | {"mass_by_head": " ".join(f"{head:.6g}" for head in layer.mass_by_head[:, r].tolist())}


def _write(path: Path, table: Sequence[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows(table)
