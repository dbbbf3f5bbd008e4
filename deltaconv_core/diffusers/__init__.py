"""ΔConv in diffusers: `apply` puts trained blocks on a pipeline or a model, `remove` takes them off again.

Needs the diffusers library: `pip install ".[diffusers]"` in the repository.
"""

from .apply import apply, remove

__all__ = ["apply", "remove"]
