"""What layers cost, as text: Markdown, and aligned."""

from __future__ import annotations

from collections.abc import Sequence

from ..util.text import markdown
from .layers import LayerCost


def sums(costs: Sequence[LayerCost]) -> tuple[float, float, int, int]:
    """Seconds of attention and of ΔConv, and their floating point operations, over all parts."""
    return (
        sum(cost.attention_seconds for cost in costs),
        sum(cost.block_seconds for cost in costs),
        sum(cost.attention_flops for cost in costs),
        sum(cost.block_flops for cost in costs),
    )


def layer_table(costs: Sequence[LayerCost]) -> str:
    """A row for each of the costs, of which there is at least one, and their sums."""
    rows = [
        {
            "part": cost.part,
            "layers": str(cost.sites),
            "tokens": "{}x{}".format(*cost.grid),
            "C": str(cost.channels),
            "K": str(cost.kernel_size),
            **_figures(cost.attention_seconds, cost.block_seconds, cost.attention_flops, cost.block_flops),
        }
        for cost in costs
    ]
    layers = str(sum(cost.sites for cost in costs))
    total = {"part": "all", "layers": layers, "tokens": "", "C": "", "K": "", **_figures(*sums(costs))}
    return "\n".join(markdown([*rows, total]))


def _figures(
    attention_seconds: float, block_seconds: float, attention_flops: int, block_flops: int
) -> dict[str, str]:
    return {
        "attention ms": f"{1000 * attention_seconds:,.2f}",
        "ΔConv ms": f"{1000 * block_seconds:,.2f}",
        "times": f"{attention_seconds / block_seconds:.2g}",
        "attention GFLOP": _giga(attention_flops),
        "ΔConv GFLOP": _giga(block_flops),
        "fewer": f"{attention_flops / block_flops:.1f}",
    }


def _giga(flops: int) -> str:
    """In units of 1e9, to three digits or whole numbers."""
    return f"{flops / 1e9:,.0f}" if flops >= 1e11 else f"{flops / 1e9:.3g}"
