"""Self-attention sites: what is known of each architecture, which are chosen, and what stands there."""

from .architectures import (
    ARCHITECTURES,
    Level,
    Transformer,
    UNet,
    authors_gate,
    authors_specs,
    identify,
    is_transformer,
    known_heads,
    level_of,
    part_of,
    short_name,
    site_channels,
)
from .selection import select

__all__ = [
    "ARCHITECTURES",
    "Level",
    "Transformer",
    "UNet",
    "authors_gate",
    "authors_specs",
    "identify",
    "is_transformer",
    "known_heads",
    "level_of",
    "part_of",
    "select",
    "short_name",
    "site_channels",
]
