"""Where the self-attention of a diffusers model stands; read by structure: any widths and depths will do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from ..errors import DeltaConvError
from ..sites import identify
from ..util.wrappers import inside

PIPELINE_PARTS = ("unet", "transformer")  # of a pipeline
UNET_PARTS = ("down_blocks", "mid_block", "up_blocks")  # in the order of the network
SUPPORTED = "U-Nets with Transformer2DModel blocks (SD 1.x, SD 2.x, SDXL, ...) and PixArtTransformer2DModel"


@dataclass(frozen=True, eq=False)
class Stack:
    """A stack of transformer blocks that is told the height and width of its input.

    Args:
        module: the Transformer2DModel or PixArtTransformer2DModel.
        patch_size: rows and columns of the input that one token stands for.
        sites: ids of the self-attentions in it.
    """

    module: nn.Module
    patch_size: int
    sites: tuple[str, ...]

    def attentions(self) -> Iterator[nn.Module]:
        """Every attention in the stack, of whatever kind."""
        for block in _blocks(self.module):
            yield from (part for part in (block.attn1, block.attn2) if part is not None)


@dataclass
class Sites:
    """What `find_sites` saw.

    Args:
        attentions: site id -> the self-attention, in the order of the network.
        channels: site id -> C of its tokens.
        stacks: those that they stand in.
        context_dim: width of the text embedding, where the model says it.
    """

    attentions: dict[str, nn.Module] = field(default_factory=dict)
    channels: dict[str, int] = field(default_factory=dict)
    stacks: list[Stack] = field(default_factory=list)
    context_dim: int | None = None

    @property
    def architecture(self) -> str:
        return identify(self.channels, self.context_dim)


def network_of(pipeline_or_model: Any) -> nn.Module:
    """The denoising network of a pipeline; a model itself, out of wrappers (`inside`).

    Raises:
        DeltaConvError: neither a model nor a pipeline with one.
    """
    model = pipeline_or_model
    if not isinstance(model, nn.Module):
        parts = (getattr(pipeline_or_model, name, None) for name in PIPELINE_PARTS)
        model = next((part for part in parts if isinstance(part, nn.Module)), None)
    if model is None:
        raise DeltaConvError(
            f"expected a diffusers model, or a pipeline with {' or '.join(PIPELINE_PARTS)}; "
            f"got {type(pipeline_or_model).__name__}"
        )
    return inside(model)


def find_sites(model: nn.Module) -> Sites:
    """The sites of a model.

    Raises:
        DeltaConvError: a model without any, or no diffusers library.
    """
    found = Sites()
    # Modules are listed as they were made: the middle of a U-Net after its end.
    for path, module in sorted(model.named_modules(), key=lambda named: _part(named[0])):
        patch_size = _patch_size(module)
        name = path.replace("._orig_mod", "")  # parts that were compiled one by one
        if patch_size:
            _refuse_wrapped(model, name)
            _read_blocks(f"{name}." if name else "", module, patch_size, found)
    if not found.attentions:
        raise DeltaConvError(
            f"this model ({type(model).__name__}) has no self-attention that ΔConv can stand in for; it "
            f"works on {SUPPORTED}"
        )
    return found


def _refuse_wrapped(model: nn.Module, name: str) -> None:
    """A stack that does not lie where networks have theirs lies in a network inside of something else."""
    if name and name.partition(".")[0] not in UNET_PARTS:
        around = re.split(rf"\.(?:{'|'.join(UNET_PARTS)})\.", name)[0]
        raise DeltaConvError(
            f"the network stands inside this model ({type(model).__name__}), as its {around}; give that to "
            "ΔConv, or put ΔConv on the network before it is wrapped"
        )


def _part(name: str) -> int:
    """The place of a module's part in the order of the network."""
    part = name.partition(".")[0]
    return UNET_PARTS.index(part) if part in UNET_PARTS else 0


def _patch_size(module: nn.Module) -> int:
    """Of a stack that states the size of its input; 0 for anything else."""
    try:
        from diffusers import PixArtTransformer2DModel, Transformer2DModel
    except ImportError as error:
        raise DeltaConvError(
            f"this needs the diffusers library ({error}): pip install '.[diffusers]' in the folder of "
            "ComfyUI-DeltaConv"
        ) from error
    stack: Any = module
    if isinstance(module, PixArtTransformer2DModel):
        return int(stack.config.patch_size)
    if isinstance(module, Transformer2DModel) and not stack.is_input_vectorized:
        return int(stack.patch_size) if stack.is_input_patches else 1
    return 0


def _read_blocks(prefix: str, module: nn.Module, patch_size: int, found: Sites) -> None:
    sites = []
    for number, block in enumerate(_blocks(module)):
        if block.only_cross_attention:
            continue
        id = f"{prefix}transformer_blocks.{number}.attn1"
        sites.append(id)
        found.attentions[id] = block.attn1
        found.channels[id] = block.attn1.query_dim
        if found.context_dim is None and block.attn2 is not None:
            found.context_dim = block.attn2.cross_attention_dim
    found.stacks.append(Stack(module, patch_size, tuple(sites)))


def _blocks(module: nn.Module) -> Iterable[Any]:
    return cast(Iterable[Any], module.transformer_blocks)
