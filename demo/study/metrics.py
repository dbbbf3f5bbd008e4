"""What is measured on pictures of the demo model: words, symmetry, Fréchet distance, PSNR. No ComfyUI.

Every figure comes with its standard error: how far it would lie, typically, from that of endlessly many
prompts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from deltaconv_core import DeltaConvError
from deltaconv_core.likeness import psnr

from ..words import SLOTS, Prompt
from .classifier import Classifier, feature_moments, features, frechet_distance, moments
from .detector import read_picture
from .drawings import as_seen, draw, every_prompt, is_held_out, random_scene

#: Mean squared error of rounding to 8 bits, for values in [0, 1]; equal pictures count as that far apart
#: (58.9 dB).
ROUNDING = 1 / 12 / 255**2


def held_out_prompts(count: int, seed: int) -> list[Prompt]:
    """``count`` prompts that training never saw, drawn without repetition; ``DeltaConvError`` for more than
    there are."""
    prompts = [prompt for prompt in every_prompt() if is_held_out(prompt)]
    if not 2 <= count <= len(prompts):
        raise DeltaConvError(f"expected 2 to {len(prompts)} held-out prompts, got {count}")
    return [prompts[i] for i in np.random.default_rng(seed).permutation(len(prompts))[:count]]


def drawings(prompts: list[Prompt], size: int, rng: np.random.Generator) -> np.ndarray:
    """A drawing of each prompt, uint8 (N, size, size, 3)."""
    return np.stack([draw(random_scene(prompt, rng), size) for prompt in prompts])


def reference_moments(
    classifier: Classifier, prompts: list[Prompt], size: int, count: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Moments of the features of ``count`` drawings of the prompts in turn, other than those of `seed`
    itself."""
    some = [prompts[i % len(prompts)] for i in range(count)]
    return feature_moments(classifier, drawings(some, size, np.random.default_rng((seed, 1))))


def words_right(pictures: np.ndarray, prompts: list[Prompt]) -> np.ndarray:
    """(N, slots) bool: whether the detector finds the prompt's word of each slot in its picture."""
    readings = [
        read_picture(picture).matches(as_seen(prompt))
        for picture, prompt in zip(pictures, prompts, strict=True)
    ]
    return np.array([[reading[slot] for slot in SLOTS] for reading in readings])


def word_shares(right: np.ndarray, prompts: list[Prompt]) -> dict[str, float]:
    """Share of right words by slot, on average (``mean``), of pictures with every word right (``all``), and
    of mirror prompts whose picture is symmetric (``symmetry``; left out where there are none)."""
    return {name: float(values.mean()) for name, values in _word_values(right, prompts).items()}


def word_errors(right: np.ndarray, prompts: list[Prompt]) -> dict[str, float]:
    """Standard errors of `word_shares`, as ``shape_error`` and so on."""
    values = _word_values(right, prompts).items()
    return {f"{name}_error": standard_error(numbers) for name, numbers in values}


def _word_values(right: np.ndarray, prompts: list[Prompt]) -> dict[str, np.ndarray]:
    """The numbers, one a picture, whose means are the shares."""
    values = {slot: right[:, i] for i, slot in enumerate(SLOTS)}
    mirrored = [prompt.layout == "mirror" for prompt in prompts]
    if any(mirrored):
        values["symmetry"] = values["layout"][mirrored]
    return values | {"mean": right.mean(1), "all": right.all(1)}


def standard_error(values: np.ndarray) -> float:
    """Of the mean of ``values`` (N,); nan for a single one."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def difference(values: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """Mean of ``values - others`` (N,), which belong together in pairs, and its standard error."""
    distances = values.astype(float) - others.astype(float)
    return float(distances.mean()), standard_error(distances)


def finite_psnr(pictures: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(N,) peak signal-to-noise ratios of pairs of uint8 pictures, in dB, at most that of rounding."""
    ratios = psnr(torch.from_numpy(pictures) / 255, torch.from_numpy(others) / 255)
    return ratios.numpy().clip(max=-10 * np.log10(ROUNDING))


def frechet(
    samples: np.ndarray, reference: tuple[np.ndarray, np.ndarray], groups: int = 20
) -> tuple[float, float]:
    """Fréchet distance of samples (N, D) to reference moments, and its standard error.

    The error is a jackknife's (Efron 1982, chapter 2): the distance is taken again without each of up to
    ``groups`` equal parts of the pictures.

    Raises:
        DeltaConvError: too few pictures for that.
    """
    if len(samples) < 4:
        raise DeltaConvError(
            f"expected at least 4 pictures for a Fréchet distance and its error, got {len(samples)}; sample "
            "more prompts"
        )
    parts = np.arange(len(samples)) % min(groups, len(samples) // 2)
    without = [
        frechet_distance(moments(samples[parts != part]), reference) for part in range(parts.max() + 1)
    ]
    error = np.sqrt((len(without) - 1) * np.var(without))
    return frechet_distance(moments(samples), reference), float(error)


def measure(
    pictures: np.ndarray,
    prompts: list[Prompt],
    classifier: Classifier,
    reference: tuple[np.ndarray, np.ndarray],
    teacher: np.ndarray | None = None,
) -> dict[str, Any]:
    """Every measure of one model's pictures; those against the teacher's pictures of the same seeds where
    given. ``words`` has a digit for each picture: how many of its words are right."""
    right = words_right(pictures, prompts)
    table: dict[str, Any] = word_shares(right, prompts) | word_errors(right, prompts)
    table["frechet"], table["frechet_error"] = frechet(features(classifier, pictures), reference)
    table["words"] = "".join(str(count) for count in right.sum(1))
    if teacher is not None:
        other = words_right(teacher, prompts)
        for name, ours, theirs in (
            ("mean", right.mean(1), other.mean(1)),
            ("all", right.all(1), other.all(1)),
        ):
            table[f"{name}_difference"], table[f"{name}_difference_error"] = difference(ours, theirs)
        table["frechet_ratio"] = table["frechet"] / frechet_distance(
            feature_moments(classifier, teacher), reference
        )
        ratios = finite_psnr(pictures, teacher)
        table["psnr"], table["psnr_error"] = float(ratios.mean()), standard_error(ratios)
    return table
