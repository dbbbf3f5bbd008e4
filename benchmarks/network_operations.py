"""Floating point operations of a whole pass, with self-attention and with ΔConv in its place.

    python -m benchmarks.network_operations

Counted by PyTorch, two for each multiply-add, on networks without weights; nothing is run, so any machine
will do. ΔConv: the lean blocks of new distillations at every site. Operations are not time: one of a
convolution may take longer than one of attention.
"""

from __future__ import annotations

from functools import cache

import torch

from deltaconv_core import BlockSpec, DeltaConvBlock, bench
from deltaconv_core.diffusers.distill.single_file import FAMILIES
from deltaconv_core.sites import ARCHITECTURES, UNet, site_channels
from deltaconv_core.sites.choose_specs import ModelShape, block_specs
from deltaconv_core.util.text import markdown
from scripts.comfy_host import prepare_torchvision

from .paper_tables import META, counted

NETWORKS = {"sd15": ("SD 1.5", 768), "sdxl": ("SDXL", 2048)}
"""Name -> title, width of the text embedding."""
SIDES = (512, 1024, 2048)


def main() -> int:
    print("\n".join(table()))
    return 0


def table() -> list[str]:
    """A line for each network and size."""
    lines = []
    for architecture, (title, _) in NETWORKS.items():
        for side in SIDES:
            attention, ours = operations(architecture, side)
            lines.append(
                {
                    "model": title,
                    "size": f"{side}×{side}",
                    "TFLOP with attention": f"{attention / 1e12:.2f}",
                    "with lean ΔConv": f"{ours / 1e12:.2f}",
                    "times fewer": f"{attention / ours:.2f}×",
                }
            )
    return markdown(lines)


@cache
def operations(architecture: str, side: int) -> tuple[int, int]:
    """Of one pass for a square picture: with self-attention, and with ΔConv at every site."""
    latent = bench.latent_of((side, side))
    with_attention = with_deltaconv = bench.count_flops(lambda: _pass(architecture, latent))
    for layer in bench.layers_of(architecture, latent, _specs(architecture)):
        dim = layer.spec.dim
        attention = counted(bench.SelfAttention(dim, layer.heads, META), dim, layer.grid)
        with_deltaconv += layer.sites * (
            counted(DeltaConvBlock(layer.spec, META), dim, layer.grid) - attention
        )
    return with_attention, with_deltaconv


def _specs(architecture: str) -> dict[str, BlockSpec]:
    channels = site_channels(architecture)
    shape = ARCHITECTURES[architecture]
    assert isinstance(shape, UNet)
    return block_specs(ModelShape(architecture, channels, len(shape.down)), channels, "auto")


def _pass(architecture: str, latent: tuple[int, int]) -> None:
    prepare_torchvision()
    from diffusers import UNet2DConditionModel

    width = NETWORKS[architecture][1]
    config = {key: value for key, value in FAMILIES[width]["unet"].items() if key != "_class_name"}
    with META, torch.inference_mode():
        network = UNet2DConditionModel(**config)
        more = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        network(torch.empty(1, 4, *latent), torch.empty(1), torch.empty(1, 77, width), added_cond_kwargs=more)


if __name__ == "__main__":
    raise SystemExit(main())
