"""Hybrid mixers in the demo model: the shapes that are compared, and fitting all of them in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from deltaconv_core import Checkpoint
from deltaconv_core.distill.hybrid import FitSettings, Fitted, HybridFit, SeeCall, fit_hybrids
from deltaconv_core.distill.replaced import replaced
from deltaconv_core.mixers.hybrid import HybridSpec
from deltaconv_core.sites.architectures import level_of

from .train_student import Teacher

FIT_SEED, FIT_BATCH = 2000, 8  # of the noisy drawings that mixers are fitted to
LEVELS = 3  # of the demo's U-Net: 24 x 24, 12 x 12 and 6 x 6 tokens for pictures of 48 x 48


@dataclass(frozen=True)
class Shape:
    """One kind of hybrid mixer, at every site of the model.

    Args:
        landmarks: at each level of the U-Net.
        fields: other fields of `HybridSpec`.
    """

    landmarks: tuple[int, int, int]
    fields: Mapping[str, Any] = field(default_factory=dict)


def _everywhere(landmarks: int, **fields: Any) -> Shape:
    return Shape((landmarks,) * LEVELS, {"nystrom": "none"} | fields)


def _local(kernel_size: int, **fields: Any) -> dict[str, Any]:
    return {"kernel_size": kernel_size, "mean": True} | fields


COUNTS = (16, 36, 64, 144)
SHAPES = {
    **{f"pooled {n}": _everywhere(n) for n in COUNTS},
    **{f"pooled {n}, K 5": _everywhere(n, **_local(5)) for n in COUNTS},
    **{f"pooled 36, K {k}": _everywhere(36, **_local(k)) for k in (3, 9, 13)},
    "pooled 36, K 5, no mean": _everywhere(36, kernel_size=5),
    "pooled 36, K 5 by channel": _everywhere(36, **_local(5, share="channel")),
    "pooled 36, K 5, two scales": _everywhere(36, **_local(5, scales=(1.0, 0.5))),
    "pooled 36, K 5, gate": _everywhere(36, **_local(5, gate=True)),
    "window 5, pooled 36": _everywhere(36, window=5),
    "window 5, pooled 36, K 5": _everywhere(36, window=5, **_local(5)),
    **{f"Nyström {n}": _everywhere(n, nystrom="cholesky") for n in COUNTS},
    **{f"Nyström {n}, Newton": _everywhere(n, nystrom="newton") for n in (36, 64)},
    **{f"Nyström {n}, K 5": _everywhere(n, nystrom="cholesky", **_local(5)) for n in (36, 64, 144)},
    **{
        f"Nyström {n}, K 5 by channel": _everywhere(n, nystrom="cholesky", **_local(5, share="channel"))
        for n in (64, 144)
    },
    "Nyström 64, 36, 16": Shape((64, 36, 16), {"nystrom": "cholesky"}),
    "K 5": _everywhere(0, **_local(5)),
}
"""Mixers are fitted; where they have no kernels, only the gain of the landmarks is."""


def specs_of(teacher: Teacher, shape: Shape) -> dict[str, HybridSpec]:
    """The specs of a shape, by site."""
    specs = {}
    for id, site in teacher.sites.items():
        attention = teacher.network.attentions[id]
        landmarks = shape.landmarks[level_of(id, LEVELS)]
        specs[id] = HybridSpec(
            site.channels, attention.heads, attention.dim_head, landmarks=landmarks, **shape.fields
        )
    return specs


class Between(torch.nn.Module):
    """What is called as a hybrid mixer, with its attention's projections around it: (x, grid) -> y, as other
    mixers."""

    def __init__(self, teacher: Teacher, site: str, mixer: torch.nn.Module) -> None:
        super().__init__()
        self.intercepted = import_module(".nodes.host.model.attend", teacher.pack).intercepted
        self.attention = own_forward(teacher, site)
        self.mixer = mixer

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        def attend(q: Any, k: Any, v: Any, mask: Any) -> torch.Tensor:
            return self.mixer(q, k, v, grid, mask)

        return self.intercepted(self.attention, attend)(x, transformer_options={})


def own_forward(teacher: Teacher, site: str) -> Callable[..., torch.Tensor]:
    """The forward of the attention at a site, as its class has it."""
    attention = teacher.network.attentions[site]
    return type(attention).forward.__get__(attention)


@contextmanager
def watched(teacher: Teacher, see: SeeCall) -> Iterator[None]:
    """The network's attentions tell ``see`` of their calls."""
    intercepted = import_module(".nodes.host.model.attend", teacher.pack).intercepted

    def watching(site: str) -> Callable[..., torch.Tensor]:
        forward, grid_of = own_forward(teacher, site), teacher.network.grids[site]

        def run(x: torch.Tensor, *args: Any, **call: Any) -> torch.Tensor:
            def attend(q: Any, k: Any, v: Any, mask: Any) -> None:
                see(site, q, k, v, grid_of(x, call), mask)

            return intercepted(forward, attend)(x, *args, **call)

        return run

    with replaced((teacher.network.attentions[site], watching(site)) for site in teacher.sites):
        yield


def fit_shapes(
    teacher: Teacher,
    shapes: Mapping[str, Shape],
    batches: Callable[[int], Any],
    count: int,
    settings: FitSettings,
    state: Path | None = None,
    on_picture: Callable[[int], None] | None = None,
) -> dict[str, dict[str, Fitted]]:
    """Fits every shape to every attention of the teacher in one pass.

    Args:
        teacher: the demo model.
        shapes: by name.
        batches: gives the batch of a number: noisy pictures, which count as one picture of the fit.
        count: how many of them.
        settings: of the fit.
        state, on_picture: as for `fit_hybrids`.

    Returns:
        Name of the shape -> site -> the fitted mixer.
    """
    specs = {name: specs_of(teacher, shape) for name, shape in shapes.items()}
    candidates = {site: [specs[name][site] for name in shapes] for site in teacher.sites}

    def sample(number: int) -> None:
        with torch.no_grad():
            teacher.network(batches(number))

    fit = HybridFit(candidates, settings)
    fitted = fit_hybrids(fit, partial(watched, teacher), sample, count, state, on_picture)
    return {name: {site: fitted[site][n] for site in fitted} for n, name in enumerate(shapes)}


def checkpoint_of(teacher: Teacher, fitted: Mapping[str, Fitted], metadata: Mapping[str, str]) -> Checkpoint:
    """The fitted mixers as weights of the demo model."""
    return Checkpoint(
        teacher.architecture, {site: one.mixer for site, one in fitted.items()}, metadata=dict(metadata)
    )
