"""The results of `evaluate.py` as tables and a sheet of pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from deltaconv_core.util.whole_file import write_text

from ..words import SLOTS
from .metrics import difference

#: Heading -> how a cell is made from the measures of one model; empty where a measure is missing. What
#: follows ± is the standard error.
COLUMNS = {
    **{name: f"{{{name}:.3f}} ± {{{name}_error:.3f}}" for name in (*SLOTS, "symmetry", "mean", "all")},
    "all − attention": "{all_difference:+.3f} ± {all_difference_error:.3f}",
    "Fréchet": "{frechet:.1f} ± {frechet_error:.1f}",
    "of attention's": "{frechet_ratio:.2f}×",
    "PSNR": "{psnr:.1f} ± {psnr_error:.1f} dB",
    "weights": "{weights:,}",
    "GFLOP": "{gflop:.3f}",
}


def write_json(file: Path, value: Any) -> None:
    """Write ``value``; a kill leaves the old file or the new one."""
    write_text(file, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def markdown(results: dict[str, dict[str, Any]], side: str) -> str:
    """The table of one size, a row per model."""
    lines = ["| model | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, result in results.items():
        cells = [_cell(form, {**result, **result["sizes"][side]}) for form in COLUMNS.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(form: str, measures: dict[str, Any]) -> str:
    try:
        return form.format(**measures)
    except KeyError:
        return ""


def differences(results: dict[str, dict[str, Any]], side: str, limit: float = 2.0) -> str:
    """Table of the share of right words (``mean``) of each model less that of each other one, picture by
    picture, with its standard error. "equal": nearer to zero than ``limit`` standard errors."""
    words = {
        name: np.array([int(digit) for digit in result["sizes"][side].get("words", "")]) / len(SLOTS)
        for name, result in results.items()
    }
    words = {name: shares for name, shares in words.items() if len(shares)}
    lines = ["| words right, less those of | " + " | ".join(words) + " |", "|---" * (len(words) + 1) + "|"]
    for name, ours in words.items():
        cells = []
        for other, theirs in words.items():
            mean, error = difference(ours, theirs)
            cell = f"{mean:+.3f} ± {error:.3f}" + (", equal" if abs(mean) <= limit * error else "")
            cells.append("" if name == other else cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sheet(folder: Path, names: list[str], side: str, shown: int = 16) -> None:
    """``sheet-<side>.png``: the first pictures of every model, a row each."""
    from PIL import Image

    rows = []
    for name in names:
        with np.load(folder / "pictures" / f"{name}-{side}.npz") as stored:
            rows.append(np.concatenate(list(stored["pictures"][:shown]), axis=1))
    picture = Image.fromarray(np.concatenate(rows))
    scale = 2 if int(side) < 64 else 1
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    picture.save(folder / f"sheet-{side}.png")


def write_report(folder: Path, results: dict[str, dict[str, Any]]) -> None:
    """``evaluation.md``, ``evaluation.json`` and the sheets in the folder; prints the tables."""
    settings = next(iter(results.values()))["settings"]
    texts = []
    for side, prompts, steps in settings["sizes"]:
        sheet(folder, list(results), str(side))
        texts += [
            f"{prompts} held-out prompts, {side}x{side}, {steps} steps, cfg {settings['cfg']}, "
            f"seed {settings['seed']}, {settings['reference']} drawings as reference",
            markdown(results, str(side)),
            differences(results, str(side)),
            f"![pictures by {', '.join(results)}, from the top](sheet-{side}.png)",
        ]
    text = "\n\n".join(texts) + "\n"
    (folder / "evaluation.md").write_text(text, encoding="utf-8")
    models = {
        name: {key: value for key, value in result.items() if key != "settings"}
        for name, result in results.items()
    }
    write_json(folder / "evaluation.json", {"settings": settings, "models": models})
    print(text)
