"""What a ΔConvBlock is made of: one small record that refuses nonsense when it is built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import DeltaConvError
from ..util.plain_values import built

GATES = ("simple", "sigmoid", "scaled")
MERGES = ("concat", "sum")
POOLINGS = ("average", "bilinear")
MAX_STAGES = 8
LEAN_RATIO = 0.3


@dataclass(frozen=True)
class BlockSpec:
    """The shape of one ΔConvBlock (paper section 4; defaults are those of the authors' code).

    Args:
        dim: channels C of the tokens.
        kernel_size: side K of the depth-wise kernels; odd, so that zero padding K // 2 keeps the size.
        scales: one pyramid stage each, 0 < s <= 1; a stage works on max(1, int(H * s)) rows.
        gate: "simple" a * b * sqrt(inter / 2) (authors) | "sigmoid" a * sigmoid(b) (authors, PixArt) |
            "scaled" a * b / sqrt(inter) (paper); a and b are the halves of the inter channels.
        merge: "concat" of the stages on channels (authors) | "sum" (paper, formula 3).
        pooling: "average", adaptive (authors) | "bilinear" (the authors' earlier block).
        depthwise_bias: whether the depth-wise convolutions have a bias.
        ratio: inter = int(dim * ratio) channels between the two projections.
        context: one more stage, without a convolution and not in the paper: what the gate gives at each
            token, averaged over the image, passed through the gate again as the first half of the channels.
            That is linear attention with one number per channel for its state.

    Raises:
        DeltaConvError: a value of the wrong type or range, named with what was expected.
    """

    dim: int
    kernel_size: int
    scales: tuple[float, ...] = (1.0, 0.5)
    gate: str = "simple"
    merge: str = "concat"
    pooling: str = "average"
    depthwise_bias: bool = False
    ratio: float = 0.5
    context: bool = False

    def __post_init__(self) -> None:
        check_int("dim", self.dim, 1, 2**16)
        check_int("kernel_size", self.kernel_size, 1, 255)
        if self.kernel_size % 2 == 0:
            raise DeltaConvError(
                f"expected an odd kernel_size (the output keeps the size), got {self.kernel_size}"
            )
        object.__setattr__(self, "scales", checked_scales(self.scales))
        check_choice("gate", self.gate, GATES)
        check_choice("merge", self.merge, MERGES)
        check_choice("pooling", self.pooling, POOLINGS)
        for name in ("depthwise_bias", "context"):
            if not isinstance(value := getattr(self, name), bool):
                raise DeltaConvError(f"expected {name} to be True or False, got {value!r}")
        if not _is_real(self.ratio) or not 0 < self.ratio <= 8:
            raise DeltaConvError(f"expected 0 < ratio <= 8, got {self.ratio!r}")
        if self.inter < 2 or self.inter % 2:
            raise DeltaConvError(
                f"the gate halves int(dim * ratio) channels, so that number must be even and at least 2, "
                f"got {self.inter} from dim={self.dim}, ratio={self.ratio}; choose another dim or ratio"
            )

    @classmethod
    def lean(cls, dim: int, kernel_size: int) -> BlockSpec:
        """The block for new distillations: less than 60 % of the authors' operations, and a context stage.

        Its stages are summed as in the paper's formula 3, and inter is the multiple of 16 nearest to
        LEAN_RATIO * dim, so that matrix products stay fast; an even number when dim is below 32.
        """
        step = 16 if dim >= 32 else 2
        inter = step * max(1, round(LEAN_RATIO * dim / step))
        return cls(dim, kernel_size, merge="sum", ratio=ratio_of(inter, dim), context=True)

    @property
    def inter(self) -> int:
        """Channels between the two projections."""
        return int(self.dim * self.ratio)

    @property
    def merged(self) -> int:
        """Channels that enter `conv_out`."""
        return self.inter // 2 * (len(self.scales) + self.context if self.merge == "concat" else 1)

    @property
    def num_parameters(self) -> int:
        """Number of weights of one block."""
        stage = self.inter * self.kernel_size**2 + self.inter * self.depthwise_bias
        projections = (self.dim + 1) * self.inter + (self.merged + 1) * self.dim + (self.dim + 1) * self.dim
        return projections + len(self.scales) * stage

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return {**asdict(self), "scales": list(self.scales)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BlockSpec:
        """Builds a spec from `to_dict`'s values.

        Raises:
            DeltaConvError: an unknown or missing field, or a value that the spec refuses.
        """
        return built(cls, values, needed=("dim", "kernel_size"), what="block settings")


def ratio_of(inter: int, dim: int) -> float:
    """A ratio with int(dim * ratio) == inter, as plain as possible."""
    ratios = (0.5, LEAN_RATIO, inter / max(dim, 1), (inter + 0.5) / max(dim, 1))
    return next((ratio for ratio in ratios if int(dim * ratio) == inter), 0.5)


def _is_real(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)  # of any length


def check_int(name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise DeltaConvError(f"expected {name} to be a whole number from {least} to {most}, got {value!r}")


def check_odd(name: str, size: int) -> None:
    """Of a kernel or window that may also be left out."""
    if size and size % 2 == 0:
        raise DeltaConvError(f"expected {name} to be odd, or 0 for none, got {size}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise DeltaConvError(f"expected {name} to be one of {', '.join(choices)}, got {value!r}")


def checked_scales(scales: object) -> tuple[float, ...]:
    if not isinstance(scales, (tuple, list)) or not 1 <= len(scales) <= MAX_STAGES:
        raise DeltaConvError(f"expected scales to be 1 to {MAX_STAGES} numbers, got {scales!r}")
    if not all(_is_real(s) and 0 < s <= 1 for s in scales):
        raise DeltaConvError(f"expected every scale to be a number with 0 < scale <= 1, got {scales!r}")
    return tuple(float(s) for s in scales)
