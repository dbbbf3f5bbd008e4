"""Sockets, names and texts that the nodes share."""

from __future__ import annotations

from comfy_api.latest import io

CATEGORY = "ΔConv"
Weights = io.Custom("DELTACONV_WEIGHTS")
LossMap = io.Custom("LOSS_MAP")

BLOCKS_TOOLTIP = (
    "all, or a comma list of down, mid, up and site names with wildcards; a leading - excludes. Example: "
    "all,-mid,-up_blocks.3"
)
