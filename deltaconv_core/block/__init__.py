"""ΔConvBlock: its spec, its formulas (`reference`), its module, and the operators that run it (`ops`)."""

from .module import DeltaConvBlock

__all__ = ["DeltaConvBlock"]
