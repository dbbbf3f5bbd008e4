"""Training curves side by side: ``python -m demo.study.curves NAME=log.csv ... --output curves.svg``.

Reads the logs of the trainings (columns step, stage, feature, teacher, noise) and draws each loss in a panel
of its own, on a logarithmic scale; a dotted line marks where the next stage begins. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import csv
from itertools import pairwise
from pathlib import Path
from typing import Any

from deltaconv_core import DeltaConvError

from ..files import named_file

PANELS = {
    "feature": "feature loss: each mixer against its attention",
    "teacher": "output against the teacher's",
    "noise": "output against the truth",
}


def read_log(file: Path) -> list[dict[str, str]]:
    """The rows of a training log; ``DeltaConvError`` when it is none."""
    try:
        with file.open(newline="", encoding="utf-8") as log:
            reader = csv.DictReader(log)
            columns, rows = reader.fieldnames or [], list(reader)
    except OSError as error:
        raise DeltaConvError(f"cannot read {file}: {error}") from error
    missing = [column for column in ("step", "stage", *PANELS) if column not in columns]
    if missing or not rows:
        raise DeltaConvError(
            f"{file} is not a training log: it has {len(rows)} rows and the columns {', '.join(columns)}"
        )
    return rows


def curve(rows: list[dict[str, str]], loss: str, mean: int = 1) -> tuple[list[int], list[float]]:
    """Steps and values of one loss, where the log has it: means of ``mean`` rows, at the last of each."""
    there = [row for row in rows if row[loss]]
    groups = [there[i : i + mean] for i in range(0, len(there) - mean + 1, mean)]
    values = [sum(float(row[loss]) for row in group) / mean for group in groups]
    return [int(group[-1]["step"]) for group in groups], values


def stage_changes(rows: list[dict[str, str]]) -> list[int]:
    """The last step before each change of the stage."""
    return [int(row["step"]) for row, after in pairwise(rows) if row["stage"] != after["stage"]]


def draw_curves(logs: dict[str, list[dict[str, str]]], file: Path, mean: int = 1) -> None:
    """Write the picture, a point for every ``mean`` rows; the file's ending says the kind (svg, png)."""
    plt = _pyplot()
    shown = [loss for loss in PANELS if any(curve(rows, loss)[0] for rows in logs.values())]
    if not shown:
        raise DeltaConvError(f"the logs of {', '.join(logs)} hold none of the losses {', '.join(PANELS)}")
    figure, panels = plt.subplots(
        1, len(shown), figsize=(5 * len(shown), 3.6), squeeze=False, layout="constrained"
    )
    for panel, loss in zip(panels[0], shown, strict=True):
        for number, (name, rows) in enumerate(logs.items()):
            panel.plot(*curve(rows, loss, mean), label=name, color=f"C{number}", linewidth=1.2)
            for step in stage_changes(rows):
                panel.axvline(step, color=f"C{number}", linestyle=":", linewidth=0.8)
        panel.set(title=PANELS[loss], xlabel="step", yscale="log")
        panel.grid(alpha=0.3)
    panels[0, 0].legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise DeltaConvError("drawing curves needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "deltaconv"  # the same logs give the same file
    import matplotlib.pyplot

    return matplotlib.pyplot


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", type=named_file, nargs="+", metavar="NAME=FILE", help="a training's log.csv")
    parser.add_argument("--output", type=Path, required=True, help="picture to write, .svg or .png")
    parser.add_argument("--mean", type=int, default=20, help="rows that make a point (default 20)")
    args = parser.parse_args()
    try:
        draw_curves({name: read_log(file) for name, file in args.log}, args.output, args.mean)
    except DeltaConvError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
