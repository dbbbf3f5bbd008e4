"""Self-attention sites: what is known of each architecture, which are chosen, and what stands there."""

from .architectures import (
    ARCHITECTURES,
    Level,
    Transformer,
    UNet,
    authors_specs,
    identify,
    select,
    site_channels,
)

__all__ = [
    "ARCHITECTURES",
    "Level",
    "Transformer",
    "UNet",
    "authors_specs",
    "identify",
    "select",
    "site_channels",
]
