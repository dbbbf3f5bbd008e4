"""What is measured on pictures of the demo model: words, symmetry, Fréchet distance, PSNR. No ComfyUI."""

from __future__ import annotations

import numpy as np

from deltaconv_core import DeltaConvError

from ..words import SLOTS, Prompt
from .classifier import Classifier, feature_moments, frechet_distance
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
    shares = {slot: float(share) for slot, share in zip(SLOTS, right.mean(0), strict=True)}
    mirrored = right[[prompt.layout == "mirror" for prompt in prompts], list(SLOTS).index("layout")]
    if len(mirrored):
        shares["symmetry"] = float(mirrored.mean())
    shares["mean"] = float(right.mean())
    shares["all"] = float(right.all(1).mean())
    return shares


def difference(values: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """Mean of ``values - others`` (N,), which belong together in pairs, and its standard error."""
    distances = values.astype(float) - others.astype(float)
    return float(distances.mean()), float(distances.std(ddof=1) / np.sqrt(len(distances)))


def psnr(pictures: np.ndarray, others: np.ndarray) -> float:
    """Mean over pairs of uint8 pictures of the peak signal-to-noise ratio, in dB."""
    error = ((pictures.astype(float) - others) / 255) ** 2
    return float((-10 * np.log10(np.maximum(error.mean(axis=(1, 2, 3)), ROUNDING))).mean())


def measure(
    pictures: np.ndarray,
    prompts: list[Prompt],
    classifier: Classifier,
    reference: tuple[np.ndarray, np.ndarray],
    teacher: np.ndarray | None = None,
) -> dict[str, float]:
    """Every measure of one model's pictures; those against the teacher's pictures of the same seeds where
    given."""
    right = words_right(pictures, prompts)
    table = word_shares(right, prompts)
    table["frechet"] = frechet_distance(feature_moments(classifier, pictures), reference)
    if teacher is not None:
        other = words_right(teacher, prompts)
        table["mean_difference"], table["mean_error"] = difference(right.mean(1), other.mean(1))
        table["all_difference"], table["all_error"] = difference(right.all(1), other.all(1))
        table["frechet_ratio"] = table["frechet"] / frechet_distance(
            feature_moments(classifier, teacher), reference
        )
        table["psnr"] = psnr(pictures, teacher)
    return table
