"""What a joint mixer is made of: one small record that refuses nonsense when it is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ...block.spec import check_int, check_odd, checked_scales
from ...util.plain_values import built


@dataclass(frozen=True)
class JointSpec:
    """The parts of one joint mixer, which stands between the projections of a joint attention.

    Args:
        dim: channels C of the tokens.
        heads: number of heads of the queries.
        head_dim: channels d of one head's queries, keys and values.
        landmarks: at most how many cells P the image is divided into; to the image's queries a cell is
            represented by its mean key and value, whatever the size of the image.
        window: side of a window around each of the image's queries, odd, whose tokens enter the softmax one
            by one; the landmarks stand for the tokens outside it. 0: none.
        kernel_size: side K of the local kernels on the image's values, odd; each head has its own. 0: none.
        scales: of the local part, one kernel each, 0 < s <= 1; a scale works on max(1, int(H * s)) rows.

    Raises:
        DeltaConvError: a value of the wrong type or range.
    """

    dim: int
    heads: int
    head_dim: int
    landmarks: int = 256
    window: int = 0
    kernel_size: int = 9
    scales: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        for name, least, most in (
            ("dim", 1, 2**16),
            ("heads", 1, 2**12),
            ("head_dim", 1, 2**12),
            ("landmarks", 1, 2**14),
            ("window", 0, 255),
            ("kernel_size", 0, 255),
        ):
            check_int(name, getattr(self, name), least, most)
        check_odd("window", self.window)
        check_odd("kernel_size", self.kernel_size)
        object.__setattr__(self, "scales", checked_scales(self.scales))

    @property
    def inner(self) -> int:
        """Channels of the queries of all heads."""
        return self.heads * self.head_dim

    @property
    def share(self) -> str:
        """Who has kernels and gains of its own: each head, as `HybridSpec` says it."""
        return "head"

    @property
    def shared(self) -> int:
        """How many kernels and gains there are of each kind."""
        return self.heads

    @property
    def num_parameters(self) -> int:
        """Number of weights of one mixer."""
        return self.heads * (len(self.scales) * self.kernel_size**2 + 2)

    @property
    def text(self) -> str:
        """The mixer in a few words."""
        parts = {"window": self.window, "K": self.kernel_size}
        return ", ".join([f"{self.landmarks} landmarks", *(f"{name} {n}" for name, n in parts.items() if n)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return {**asdict(self), "scales": list(self.scales)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> JointSpec:
        """Builds a spec from `to_dict`'s values.

        Raises:
            DeltaConvError: an unknown or missing field, or a value that the spec refuses.
        """
        return built(cls, values, needed=("dim", "heads", "head_dim"), what="settings of a joint mixer")
