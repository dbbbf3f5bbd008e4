"""(H, W) of the tokens at a site, from what the host states, never from their number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ....deltaconv_core.block.module import check_tokens
from ....deltaconv_core.errors import DeltaConvError


def of_unet(x: torch.Tensor, call: dict[str, Any]) -> tuple[int, int]:
    """The grid in a U-Net: ComfyUI writes the shape of this level's activations into transformer_options."""
    shape = (call.get("transformer_options") or {}).get("activations_shape")
    if shape is None:
        raise DeltaConvError(
            "this ComfyUI does not give the attention the height and width of its input "
            "(transformer_options['activations_shape']); ΔConv needs ComfyUI 0.3.60 or newer"
        )
    return _checked(x, shape[-2], shape[-1])


def of_patches(patch_size: int) -> Callable[[torch.Tensor, dict[str, Any]], tuple[int, int]]:
    """The grid in PixArt, which hands over HW in latent units while its tokens are patches."""

    def of_pixart(x: torch.Tensor, call: dict[str, Any]) -> tuple[int, int]:
        height, width = call["HW"]
        return _checked(x, height // patch_size, width // patch_size)

    return of_pixart


def _checked(x: torch.Tensor, height: int, width: int) -> tuple[int, int]:
    check_tokens(x, (height, width))
    return height, width
