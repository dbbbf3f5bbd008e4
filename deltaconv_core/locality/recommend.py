"""From locality to a replacement: which layers, and the kernel size of each.

A stage at scale s works on a picture s times as large, so its K x K kernel reaches over K / s tokens. A layer
gets the smallest odd K, from 3 up, whose widest stage covers its effective receptive field (without sinks,
which the paper calls artefacts). A layer for which that would be more than the limit is better left alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..block.spec import BlockSpec
from ..errors import DeltaConvError
from ..util.foreign_json import parse_json
from ..util.text import quoted
from .result import LayerLocality

KIND = "deltaconv-recommendation"
VERSION = 1
SMALLEST_RECOMMENDED = 3
LARGEST_RECOMMENDED = 13  # the authors' largest


@dataclass(frozen=True)
class Recommendation:
    """Which layers of a model to replace.

    Args:
        architecture: name of the model's shape.
        kernel_sizes: site -> K, for the layers to replace.
        skip: the layers to leave alone.
    """

    architecture: str
    kernel_sizes: Mapping[str, int] = field(default_factory=dict)
    skip: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The text that nodes and files exchange; `from_json` reads it back."""
        return json.dumps(
            {
                "kind": KIND,
                "version": VERSION,
                "architecture": self.architecture,
                "kernel_sizes": dict(self.kernel_sizes),
                "skip": list(self.skip),
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str) -> Recommendation:
        """Reads `to_json`'s text.

        Raises:
            DeltaConvError: text that is not a recommendation, with what is wrong.
        """
        try:
            values = parse_json(text)
        except ValueError as error:
            raise DeltaConvError(
                f"expected a recommendation as JSON, got {quoted(text)} ({error}); copy the whole text again"
            ) from None
        _check(values)
        return cls(values["architecture"], values["kernel_sizes"], tuple(values["skip"]))


def recommend(
    layers: Iterable[LayerLocality],
    architecture: str,
    max_kernel_size: int = LARGEST_RECOMMENDED,
    scales: tuple[float, ...] = (1.0, 0.5),
) -> Recommendation:
    """The recommendation for layers that were looked at.

    Args:
        layers: in the order of the network.
        architecture: name of the model's shape.
        max_kernel_size: limit of K.
        scales: of the blocks that are to stand there.

    Raises:
        DeltaConvError: a limit that no block could have.
    """
    check_limit(max_kernel_size)
    kernel_sizes, skip = {}, []
    for layer in layers:
        reach = [
            k
            for k in range(SMALLEST_RECOMMENDED, max_kernel_size + 1, 2)
            if k / min(scales) >= layer.erf_without_sinks
        ]
        if reach:
            kernel_sizes[layer.site] = reach[0]
        else:
            skip.append(layer.site)
    return Recommendation(architecture, kernel_sizes, tuple(skip))


def check_limit(max_kernel_size: int) -> None:
    """Refuses a limit of the kernel size that no block could have.

    Raises:
        DeltaConvError: an even one, or one below 1.
    """
    BlockSpec(dim=4, kernel_size=max_kernel_size)


def _check(values: Any) -> None:
    expected = {"kind", "version", "architecture", "kernel_sizes", "skip"}
    if not isinstance(values, dict) or values.get("kind") != KIND or set(values) != expected:
        raise DeltaConvError(
            f"expected a recommendation of the kind {KIND!r} with {sorted(expected)}, got "
            f"{quoted(values, 200)}; copy the whole text again"
        )
    if values["version"] != VERSION:
        raise DeltaConvError(
            f"this recommendation has version {quoted(values['version'])}, known is {VERSION}; make it again"
        )
    kernel_sizes, skip = values["kernel_sizes"], values["skip"]
    if not isinstance(values["architecture"], str):
        raise DeltaConvError(f"expected the architecture to be a name, got {quoted(values['architecture'])}")
    if (
        not isinstance(kernel_sizes, dict)
        or not isinstance(skip, list)
        or not all(isinstance(site, str) for site in skip)
    ):
        raise DeltaConvError(
            "expected kernel_sizes to be an object and skip a list of sites, got "
            f"{quoted(kernel_sizes, 200)} and {quoted(skip, 200)}"
        )
    for site, k in kernel_sizes.items():
        try:
            BlockSpec(dim=4, kernel_size=k)
        except DeltaConvError as error:
            raise DeltaConvError(f"{site}: {error}") from None
    if both := sorted(set(kernel_sizes) & set(skip)):
        raise DeltaConvError(
            f"{', '.join(both)}: both in kernel_sizes and in skip; take each out of one of them"
        )
