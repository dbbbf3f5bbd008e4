"""A small classifier of the drawings, and the Fréchet distance of two sets of pictures on its features.

The distance is that of Heusel et al. 2017 (arXiv 1706.08500, equation 6), with this classifier in the place
of Inception: the features of a set are taken for a Gaussian, and

    d² = |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^(1/2))

It depends on the number of pictures (few pictures make it larger), so only distances of equally many can be
compared. Pictures of any size are read as they are: the classifier averages its last grid to 4x4 cells, and
was trained on pictures of 48 and of 96 pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from deltaconv_core.weights.safefile import read_file, write_file

from ..words import SLOTS, Prompt
from .drawings import as_seen

SIZES = (48, 96)
FEATURES = 64
WIDTHS = (24, 32, 48, 64, 64)
STRIDES = (2, 1, 2, 1, 2)
CELLS = 4


class Classifier(nn.Module):
    """Five convolutions, each with group normalization, then features, then the words of every slot."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width, stride in zip((3, *WIDTHS), WIDTHS, STRIDES, strict=False):
            layers += [nn.Conv2d(before, width, 3, stride, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
        self.convolutions = nn.Sequential(*layers)
        self.features = nn.Linear(WIDTHS[-1] * CELLS**2, FEATURES)
        self.words = nn.Linear(FEATURES, sum(len(words) for words in SLOTS.values()))

    def penultimate(self, pictures: torch.Tensor) -> torch.Tensor:
        """Features (B, 64) of pictures (B, 3, H, W) in [-1, 1]."""
        cells = F.adaptive_avg_pool2d(self.convolutions(pictures), CELLS)
        return F.silu(self.features(cells.flatten(1)))

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits (B, words of the slot) by slot."""
        logits = self.words(self.penultimate(pictures)).split([len(words) for words in SLOTS.values()], 1)
        return dict(zip(SLOTS, logits, strict=True))


def save_classifier(classifier: Classifier, path: Path, metadata: dict[str, str]) -> None:
    """Write the weights in float16."""
    write_file(path, {name: tensor.half() for name, tensor in classifier.state_dict().items()}, metadata)


def load_classifier(path: Path) -> Classifier:
    """Read what `save_classifier` wrote, as float32."""
    classifier = Classifier()
    classifier.load_state_dict({name: tensor.float() for name, tensor in read_file(path)[1].items()})
    return classifier.requires_grad_(False).eval()


def as_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) as float (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def word_numbers(prompts: list[Prompt]) -> torch.Tensor:
    """(N, slots): for each slot the number of the prompt's word among the words of that slot."""
    return torch.tensor(
        [
            [words.index(word) for words, word in zip(SLOTS.values(), as_seen(prompt), strict=True)]
            for prompt in prompts
        ]
    )


@torch.inference_mode()
def features(classifier: Classifier, pictures: np.ndarray, batch: int = 100) -> np.ndarray:
    """Features (N, 64) of uint8 pictures (N, H, W, 3), in float64."""
    parts = [
        classifier.penultimate(as_tensor(pictures[first : first + batch])).double().numpy()
        for first in range(0, len(pictures), batch)
    ]
    return np.concatenate(parts)


def feature_moments(classifier: Classifier, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (64,) and covariance (64, 64) of the features of pictures."""
    return moments(features(classifier, pictures))


def moments(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of samples (N, D); ``ValueError`` for fewer than two."""
    if len(samples) < 2:
        raise ValueError(f"a covariance needs at least two pictures, got {len(samples)}")
    return samples.mean(0), np.cov(samples, rowvar=False)


def frechet_distance(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> float:
    """d² of two Gaussians given by mean (D,) and covariance (D, D).

    tr (C1 C2)^(1/2) is the sum of the square roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is
    symmetric and positive; covariances of too few pictures, which have no inverse, do no harm.
    """
    values, vectors = np.linalg.eigh(first[1])
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ second[1] @ root).clip(0)
    return float(
        np.square(first[0] - second[0]).sum()
        + np.trace(first[1])
        + np.trace(second[1])
        - 2 * np.sqrt(cross).sum()
    )
