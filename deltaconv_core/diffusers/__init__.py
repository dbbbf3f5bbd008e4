"""ΔConv in diffusers: `apply` puts trained blocks on a pipeline or a model, `applied` says which are on
it, `remove` takes them off again.

Needs the diffusers library: `pip install ".[diffusers]"` in the repository.
"""

from .applied import Applied, applied
from .apply import apply, remove

__all__ = ["Applied", "applied", "apply", "remove"]
