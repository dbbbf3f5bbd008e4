"""Short names of layers, for pictures and tables."""

from __future__ import annotations

import re

RULES = (
    (r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.transformer_blocks\.(\d+)\.attn1", r"\1\2.\3.\4"),
    (r"mid_block\.attentions\.\d+\.transformer_blocks\.(\d+)\.attn1", r"mid.\1"),
    (r"single_transformer_blocks\.(\d+)\.attn", r"single\1"),
    (r"transformer_blocks\.(\d+)\.attn1?", r"\1"),
    (r"noise_refiner\.(\d+)\.attn", r"noise\1"),
    (r"layers\.(\d+)\.attn", r"\1"),
)


def short_name(site: str) -> str:
    """`down_blocks.1.attentions.0.transformer_blocks.0.attn1` is "down1.0", its next block "down1.0.1"."""
    for pattern, short in RULES:
        if match := re.fullmatch(pattern, site):
            name = match.expand(short)
            return name.removesuffix(".0") if name.count(".") == 2 or name == "mid.0" else name
    return site
