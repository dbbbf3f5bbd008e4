"""The ΔConvBlocks of one MODEL as ComfyUI holds them: counted, loaded and offloaded as other weights are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import comfy.model_patcher
import torch
from comfy.model_patcher import ModelPatcher

from ....deltaconv_core.block.module import HALF_OR_MORE, shared_copy
from ....deltaconv_core.mixers.shared import shared_mixer
from ....deltaconv_core.weights.checkpoint import DELTACONV_KIND, JOINT_KIND
from .forwards import Layers


class DeltaConvBlocks(torch.nn.Module):
    """All blocks of one patched MODEL; ComfyUI's log names models by their class."""

    def __init__(self, blocks: Mapping[str, torch.nn.Module]) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(blocks.values())


class SiteMixers(torch.nn.Module):
    """What stands in one block of a network of text and image together, which may have several attentions.

    Args:
        mixers: site id -> JointMixer, or DeltaConvBlock.
    """

    def __init__(self, mixers: Mapping[str, Any]) -> None:
        super().__init__()
        self.kind = next((str(mixer.kind) for mixer in mixers.values()), JOINT_KIND)
        self.ids = list(mixers)
        self.mixers = torch.nn.ModuleList(mixers.values())

    def of(self, id: str) -> Any:
        """The mixer at a site; None where there is none."""
        return self.mixers[self.ids.index(id)] if id in self.ids else None


def build_blocks(trained: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, torch.nn.Module]:
    """The trained blocks again, out of ComfyUI's castable layers; weights are shared where the dtype allows.

    Args:
        trained: site id -> DeltaConvBlock, or another mixer, which has no layers and few parameters, and
            moves and casts those itself.
        dtype: of the weights of blocks; None keeps each as it is.
    """
    return {id: _copy(block, dtype) for id, block in trained.items()}


def _copy(block: Any, dtype: torch.dtype | None) -> torch.nn.Module:
    if isinstance(block, SiteMixers):
        return SiteMixers({id: _copy(block.of(id), dtype) for id in block.ids})
    return shared_copy(block, None, dtype, Layers) if block.kind == DELTACONV_KIND else shared_mixer(block)


def network_dtype(model: ModelPatcher) -> torch.dtype | None:
    """The dtype that the MODEL's network computes in; None where it is not an ordinary floating point one."""
    dtype = model.get_model_object("manual_cast_dtype") or model.model_dtype()
    return dtype if dtype in HALF_OR_MORE else None


def own_patcher(blocks: Mapping[str, torch.nn.Module], model: ModelPatcher) -> ModelPatcher:
    """A ModelPatcher for the blocks, on the devices of the MODEL and of its kind (see `kind_of_patcher`)."""
    patcher_class = comfy.model_patcher.ModelPatcher
    if kind_of_patcher(model)[1]:
        patcher_class = comfy.model_patcher.CoreModelPatcher
    net = DeltaConvBlocks(blocks)
    return patcher_class(net, load_device=model.load_device, offload_device=model.offload_device)


def build_blocks_again(ids: Iterable[str], patcher: ModelPatcher) -> dict[str, torch.nn.Module]:
    """The blocks of a patcher once more, by site id and in its order, for a patcher of their own."""
    with torch.inference_mode(False):
        blocks = build_blocks(dict(zip(ids, patcher.model.blocks, strict=True)), None)
        return {id: block.to(patcher.offload_device) for id, block in blocks.items()}


PatcherKind = tuple[torch.device, bool]


def kind_of_patcher(patcher: ModelPatcher) -> PatcherKind:
    """Where it loads its model, and whether it pages weights in and out under the layers ("dynamic VRAM").

    One plain model among those that a sampling needs makes ComfyUI unload dynamic ones; and compiled code can
    only be made of plain ones.
    """
    return patcher.load_device, getattr(patcher, "is_dynamic", lambda: False)()
