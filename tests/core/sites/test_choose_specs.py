"""The blocks that a distillation starts with: kernel sizes, and the authors' own."""

from __future__ import annotations

from deltaconv_core.sites import authors_specs, site_channels
from deltaconv_core.sites.choose_specs import ModelShape, automatic, block_specs


def test_released_blocks_are_the_authors():
    for name in ("sd15", "sdxl", "pixart_sigma"):
        shape = ModelShape(name, site_channels(name))
        assert automatic(shape) == authors_specs(name)
        assert block_specs(shape, shape.channels, "auto", "released") == authors_specs(name)


def test_kernels_are_smaller_where_the_grid_is_coarser():
    parts = "down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1", "up_blocks.2"
    channels = {f"{part}.attentions.0.transformer_blocks.0.attn1": 32 for part in parts}
    specs = automatic(ModelShape("unet-32x6", channels, levels=4))
    assert [spec.kernel_size for spec in specs.values()] == [11, 9, 5, 5, 9, 11]
    specs = automatic(ModelShape("dit-32x1", {"transformer_blocks.0.attn1": 32}))
    assert [(spec.kernel_size, spec.gate) for spec in specs.values()] == [(13, "sigmoid")]
