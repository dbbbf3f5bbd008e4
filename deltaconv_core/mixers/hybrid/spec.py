"""What a hybrid mixer is made of: one small record that refuses nonsense when it is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ...block.spec import check_choice, check_int, check_odd, checked_scales
from ...errors import DeltaConvError
from ...util.plain_values import built

NYSTROM = ("none", "cholesky", "newton")
SHARES = ("head", "channel")


@dataclass(frozen=True)
class HybridSpec:
    """The parts of one hybrid mixer, which stands between the projections of an attention.

    Args:
        dim: channels C of the tokens.
        heads: number of heads.
        head_dim: channels d of one head's queries, keys and values.
        landmarks: at most how many cells P the picture is divided into; a cell is represented by its mean
            key and value, whatever the size of the picture. 0: no global part. The defaults, 144 with
            Nyström's correction and nothing else, are the cheapest of what `demo.study.compare_hybrids` found
            to be within the noise of the best on the demo model.
        nystrom: "none", softmax over the landmarks alone | Nyström's correction of it, with the inverse by
            "cholesky" (ridge) or by "newton" (Newton–Schulz iterations, matrix products alone).
        window: side of a window around each query, odd, whose tokens enter the softmax one by one; the
            landmarks stand for the tokens outside it. 0: none.
        kernel_size: side K of the local kernels on the values, odd. 0: no local part.
        scales: of the local part, one kernel each, 0 < s <= 1; a scale works on max(1, int(H * s)) rows.
        share: who has kernels and gains of its own, each "head" or each "channel".
        mean: whether the mean of the values is added, times a gain.
        gate: whether the local part is weighed with the share that the softmax gives to the query's own cell.

    Raises:
        DeltaConvError: a value of the wrong type or range, or parts that do not go together.
    """

    dim: int
    heads: int
    head_dim: int
    landmarks: int = 144
    nystrom: str = "cholesky"
    window: int = 0
    kernel_size: int = 0
    scales: tuple[float, ...] = (1.0,)
    share: str = "head"
    mean: bool = False
    gate: bool = False

    def __post_init__(self) -> None:
        for name, least, most in (
            ("dim", 1, 2**16),
            ("heads", 1, 2**12),
            ("head_dim", 1, 2**12),
            ("landmarks", 0, 2**14),
            ("window", 0, 255),
            ("kernel_size", 0, 255),
        ):
            check_int(name, getattr(self, name), least, most)
        check_odd("window", self.window)
        check_odd("kernel_size", self.kernel_size)
        object.__setattr__(self, "scales", checked_scales(self.scales))
        check_choice("nystrom", self.nystrom, NYSTROM)
        check_choice("share", self.share, SHARES)
        for name in ("mean", "gate"):
            if not isinstance(value := getattr(self, name), bool):
                raise DeltaConvError(f"expected {name} to be True or False, got {value!r}")
        self._check_parts()

    def _check_parts(self) -> None:
        if not (self.landmarks or self.kernel_size or self.mean):
            raise DeltaConvError("expected landmarks, a kernel_size or the mean, got a mixer of no part")
        if self.nystrom != "none" and (self.window or not self.landmarks):
            raise DeltaConvError(
                f"Nyström's correction works on landmarks and without a window, got landmarks "
                f"{self.landmarks}, window {self.window}; choose nystrom 'none'"
            )
        if self.window and not self.landmarks:
            raise DeltaConvError(
                f"a window of {self.window} needs landmarks for the tokens outside it, got none; without "
                "them it is neighborhood attention (mixers/neighborhood.py)"
            )
        if self.gate and (self.nystrom != "none" or self.window or not (self.landmarks and self.kernel_size)):
            raise DeltaConvError(
                "a gate weighs the local part by a softmax over landmarks alone, so it needs both, and "
                f"neither Nyström's correction nor a window; got landmarks {self.landmarks}, kernel_size "
                f"{self.kernel_size}, nystrom {self.nystrom!r}, window {self.window}"
            )

    @property
    def inner(self) -> int:
        """Channels of the queries, keys and values of all heads."""
        return self.heads * self.head_dim

    @property
    def shared(self) -> int:
        """How many kernels and gains there are of each kind: one for each head, or for each channel."""
        return self.heads if self.share == "head" else self.inner

    @property
    def num_parameters(self) -> int:
        """Number of weights of one mixer."""
        kernels = len(self.scales) * self.kernel_size**2
        return self.shared * (kernels + self.mean + bool(self.landmarks))

    @property
    def text(self) -> str:
        """The mixer in a few words."""
        parts = [f"{self.landmarks} landmarks", *(["Nyström"] if self.nystrom != "none" else [])]
        own = {"window": self.window, "K": self.kernel_size}
        return ", ".join([*parts, *(f"{name} {n}" for name, n in own.items() if n)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return {**asdict(self), "scales": list(self.scales)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HybridSpec:
        """Builds a spec from `to_dict`'s values.

        Raises:
            DeltaConvError: an unknown or missing field, or a value that the spec refuses.
        """
        return built(cls, values, needed=("dim", "heads", "head_dim"), what="settings of a hybrid mixer")
