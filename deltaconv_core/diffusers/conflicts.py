"""What else on a model acts on self-attention, and so cannot act where ΔConv stands."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..util.text import listing

# They only compute attention in another way.
PLAIN_PROCESSORS = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "AttnProcessorNPU",
    "FusedAttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
    "XLAFlashAttnProcessor2_0",
)

log = logging.getLogger(__name__)


def conflicts(model: nn.Module, sites: Mapping[str, nn.Module], keeps_projections: bool) -> list[str]:
    """One sentence for each, naming both.

    Args:
        model: the network.
        sites: site id -> the self-attention that ΔConv stands in for.
        keeps_projections: whether the layers of the self-attention still run there.
    """
    lora = "" if keeps_projections else _lora(model, sites)
    return [sentence for sentence in (lora, _processors(sites)) if sentence]


class ConflictWatch:
    """A pre-hook of the model that warns of what was put on it after ΔConv, once for each.

    Args:
        sites: site id -> the self-attention.
        keeps_projections: as for `conflicts`.
        said: sentences that the user has read already.
    """

    def __init__(self, sites: Mapping[str, nn.Module], keeps_projections: bool, said: Iterable[str]) -> None:
        self.sites = dict(sites)
        self.keeps_projections = keeps_projections
        self.said = set(said)
        self.seen: Any = None

    def __call__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        seen = tuple(_adapters(model)), {type(site.processor) for site in self.sites.values()}
        if seen == self.seen:
            return
        self.seen = seen
        for sentence in conflicts(model, self.sites, self.keeps_projections):
            if sentence not in self.said:
                self.said.add(sentence)
                log.warning("ΔConv: %s", sentence)


def _lora(model: nn.Module, sites: Mapping[str, nn.Module]) -> str:
    keys, at = [], set()
    for site, attention in sites.items():
        for name, layer in attention.named_modules():
            if hasattr(layer, "adapter_layer_names"):  # a layer of peft's
                keys.append(f"{site}.{name}")
                at.add(site)
    if not keys:
        return ""
    return (
        f"a LoRA ({', '.join(_adapters(model))}) changes {len(keys)} layers of the self-attention at "
        f"{len(at)} sites where ΔConv stands ({listing(keys)}); that part of it has no effect while ΔConv "
        "runs"
    )


def _adapters(model: nn.Module) -> Iterable[str]:
    """Names of the LoRAs on the model, as peft keeps them there."""
    return getattr(model, "peft_config", {})


def _processors(sites: Mapping[str, nn.Module]) -> str:
    names = {type(site.processor).__name__ for site in sites.values()} - set(PLAIN_PROCESSORS)
    if not names:
        return ""
    return (
        f"{', '.join(sorted(names))} computes the self-attention where ΔConv stands (guidance such as PAG or "
        "SAG?); it does not run there while ΔConv runs"
    )
