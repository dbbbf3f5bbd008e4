"""README.md of a folder of weights: what the Hugging Face Hub shows, and what it reads from the top."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from .checkpoint import DELTACONV_KIND, Checkpoint

# Identifiers of the Hub for terms that weights often come under; others it wants as "other" with a name.
LICENSES = (
    "agpl-3.0", "apache-2.0", "bigscience-openrail-m", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-nc-4.0",
    "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-4.0", "creativeml-openrail-m", "gpl-3.0",
    "lgpl-3.0", "mit", "openrail", "openrail++", "unlicense",
)  # fmt: skip
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PUBLICATION = "[Dong et al., ICCV 2025](https://arxiv.org/abs/2504.21292)"
LIBRARY = "[ComfyUI-DeltaConv](https://github.com/ComfyUI-DeltaConv/ComfyUI-DeltaConv)"
OF_BLOCKS = (
    f"ΔConv blocks ({PUBLICATION}): multi-scale depth-wise convolutions that stand in for the\n"
    f"self-attention of a diffusion model. Made with, and for, {LIBRARY}."
)
OF_MIXERS = f"""Mixers between the projections of the model's own attention: a fixed number of landmarks, some
with local kernels or a window, fitted to it without training. They are not the block of the ΔConv paper
({PUBLICATION}), and need the model that they were fitted to, or a
fine-tune of it. Made with, and for, {LIBRARY}."""


def model_card(checkpoint: Checkpoint, weights: str) -> str:
    """The text of the card.

    Args:
        checkpoint: "title", "license" and "base_model" (as the Hub names it) of its metadata go into the
            heading and the front matter, everything into the table.
        weights: name of the weights' file beside the card.
    """
    texts = checkpoint.metadata
    parameters = sum(block.spec.num_parameters for block in checkpoint.blocks.values())
    title = texts.get("title") or f"ΔConv for {checkpoint.architecture}"
    mixers = checkpoint.mixer != DELTACONV_KIND
    facts = {
        "architecture": checkpoint.architecture,
        "mixers" if mixers else "blocks": f"{len(checkpoint.blocks)} ({parameters:,} parameters)",
        "base weights": f"{len(checkpoint.base_weights)} tensors of ResNet convolutions",
        "license": "not stated",
    }
    return f"""---
{_front_matter(texts)}---

# {_plain(title)}

{OF_MIXERS if mixers else OF_BLOCKS}

```python
from deltaconv_core.diffusers import apply

apply(pipeline, "path/to/this/folder")  # remove(pipeline) takes them off again
```

In ComfyUI, put `{weights}` into `models/deltaconv` under a name of your choice, and use ΔConv Patch Model.

| | |
|---|---|
{_rows(facts | texts)}"""


def _front_matter(texts: Mapping[str, str]) -> str:
    values: dict[str, object] = {"library_name": "deltaconv", "pipeline_tag": "text-to-image"}
    values["tags"] = ["deltaconv", "self-attention", "convolution", "comfyui"]
    license = texts.get("license", "").strip()
    if license.lower() in LICENSES:
        values["license"] = license.lower()
    elif license:
        values |= {
            "license": "other",
            "license_name": re.sub(r"[^a-z0-9.]+", "-", license.lower()).strip("-"),
        }
    if HUB_ID.fullmatch(texts.get("base_model", "")):
        values |= {"base_model": texts["base_model"], "base_model_relation": "adapter"}
    # JSON of these values is YAML too.
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items())


def _rows(facts: Mapping[str, str]) -> str:
    return "".join(f"| {_plain(name)} | {_plain(text)} |\n" for name, text in facts.items())


def _plain(text: str) -> str:
    """One line in which Markdown and HTML mean nothing."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub(r"([\\`*_{}\[\]<>()#+!|&~:-])", r"\\\1", line)
