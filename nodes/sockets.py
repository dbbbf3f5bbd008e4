"""Sockets, names and texts that the nodes share."""

from __future__ import annotations

from dataclasses import fields
from inspect import signature
from typing import Any

from comfy_api.latest import io

CATEGORY = "ΔConv"
Weights = io.Custom("DELTACONV_WEIGHTS")
LossMap = io.Custom("LOSS_MAP")

ADVANCED: dict[str, Any] = {"advanced": True} if "advanced" in signature(io.WidgetInput).parameters else {}
"""For inputs that few need: newer versions of ComfyUI (from 0.9.2) show them when asked to."""

BLOCKS_TOOLTIP = (
    "all, or a comma list of down, mid, up and site names with wildcards; a leading - excludes. Example: "
    "all,-mid,-up_blocks.3"
)


def search_aliases(*words: str) -> dict[str, Any]:
    """Words by which newer versions of ComfyUI (from 0.10) find the node, beside its name; for the Schema."""
    known = any(field.name == "search_aliases" for field in fields(io.Schema))
    return {"search_aliases": list(words)} if known else {}
