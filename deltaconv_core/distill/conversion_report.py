"""What a conversion did, in words and a table, for people."""

from __future__ import annotations

import math

from ..sites import short_name
from ..util.text import markdown
from .conversion import QUALITY, Conversion


def summary_lines(conversion: Conversion, size: tuple[int, int], steps: int) -> list[str]:
    """What was replaced, and what a picture costs.

    Args:
        conversion: what was done.
        size: (width, height) of the pictures in pixels.
        steps: of their sampling.
    """
    layers, (width, height) = conversion.layers, size
    replaced = [layer for layer in layers if layer.mixer is not None]
    kind = "joint" if conversion.images else "hybrid"
    what = f"{len(replaced)} of {len(layers)} self-attentions are replaced by {kind} mixers"
    if replaced:
        errors = [layer.error for layer in replaced]
        what += f", with errors of {min(errors):.2g} to {max(errors):.2g}"
    lines = [f"{what} ({_wish(conversion)})."]
    for (before, after), (w, h), how in (
        (conversion.seconds, size, "measured; after: by the layers' times"),
        (conversion.twice, (2 * width, 2 * height), "reckoned from the layers' times"),
    ):
        faster = f", {before / after:.2f} times as fast" if replaced and math.isfinite(before) else ""
        lines.append(
            f"A picture of {w} x {h}, {steps} steps: {_s(before)} before, {_s(after)} after{faster} ({how})."
        )
    if conversion.more:
        lines.append(
            f"At twice the size mixers would pay in {conversion.more} more layers: convert at that size "
            "to be fast there."
        )
    return lines


def table(conversion: Conversion, size: tuple[int, int]) -> list[str]:
    """A line of Markdown for each self-attention; `size` as for `summary_lines`."""
    larger = "{} x {}".format(*(2 * side for side in size))
    rows = []
    for layer in conversion.layers:
        mixed = layer.mixer is not None
        rows.append(
            {
                "layer": short_name(layer.site),
                "tokens": "{} x {}".format(*layer.grid),
                "stands there": "attention" if layer.mixer is None else layer.mixer.text,
                "error": f"{layer.error:.3f}" if mixed else "",
                "attention ms": _ms(layer.seconds[0]),
                "mixer ms": _ms(layer.seconds[1]) if mixed else "",
                f"attention ms, {larger}": _ms(layer.twice[0]),
                f"mixer ms, {larger}": _ms(layer.twice[1]) if mixed else "",
            }
        )
    return markdown(rows)


def report_text(conversion: Conversion, size: tuple[int, int], steps: int) -> str:
    """All of it, and why attention stays where it does; arguments as for `summary_lines`."""
    kept = [f"Attention stays at {short_name(site)}: {why}." for site, why in conversion.kept.items()]
    lines = [
        *summary_lines(conversion, size, steps),
        "",
        *table(conversion, size),
        *([""] if kept else []),
        *kept,
    ]
    return "\n".join(lines)


def _wish(conversion: Conversion) -> str:
    wishes = conversion.wishes
    if wishes.budget == QUALITY:
        return f"quality: an error of at most {wishes.limit:g}"
    attention = sum(layer.seconds[0] * layer.calls for layer in conversion.layers)
    own = sum(layer.seconds[1] * layer.calls for layer in conversion.layers)
    return f"speed: {own / attention:.0%} of self-attention's time, {wishes.limit:.0%} were wished for"


def _s(seconds: float) -> str:
    return f"{seconds:.3g} s" if math.isfinite(seconds) else "out of memory"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g}" if math.isfinite(seconds) else "–"
