"""ΔConv in plain PyTorch: the block, its checkpoints, and everything around them that needs no host."""

from .block import DeltaConvBlock
from .block.spec import BlockSpec
from .errors import CheckpointError, DeltaConvError, FetchError, ManifestError
from .weights.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

__all__ = [
    "BlockSpec",
    "Checkpoint",
    "CheckpointError",
    "DeltaConvBlock",
    "DeltaConvError",
    "FetchError",
    "ManifestError",
    "load_checkpoint",
    "save_checkpoint",
]
