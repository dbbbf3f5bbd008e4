"""Sockets and names that the nodes share."""

from __future__ import annotations

from comfy_api.latest import io

CATEGORY = "ΔConv"
Weights = io.Custom("DELTACONV_WEIGHTS")
LossMap = io.Custom("LOSS_MAP")
