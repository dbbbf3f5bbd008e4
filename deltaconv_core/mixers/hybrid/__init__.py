"""The hybrid: a model's own projections, a fixed number of landmarks, local kernels; linear in the tokens."""

from .module import HybridMixer
from .spec import HybridSpec

__all__ = ["HybridMixer", "HybridSpec"]
