"""Random blocks of the authors, and files of them in any of the layouts of `authors_block`."""

from __future__ import annotations

import torch
from safetensors.torch import save_file

from .authors_block import Form, block, release
from .compare import relative_l2

DOWN = "down_blocks.0.attentions.0.transformer_blocks.0"
MID = "mid_block.attentions.0.transformer_blocks.0"
RESNET = "down_blocks.0.resnets.0.conv1"
GRIDS = [(8, 6), (7, 5), (9, 11)]


class Twin:
    """One block of the authors: its weights `w`, and what it makes of (B, H, W, C) tokens, (B, H * W, C)."""

    def __init__(self, dim, kernel_size, stages=2, bias=False, projection_bias=True, seed=0):
        make = torch.Generator().manual_seed(seed + dim + kernel_size)
        inter = int(dim * 0.5)
        shapes = {
            "conv_up": (inter, dim),
            "conv_out": (dim, inter // 2 * stages),
            "conv_pool": (dim, dim),
            **{f"gates.{i}.conv_spatial": (inter, 1, kernel_size, kernel_size) for i in range(stages)},
        }
        self.w = {f"{n}.weight": torch.randn(s, generator=make) / s[-1] for n, s in shapes.items()}
        self.w |= {
            f"{name}.bias": torch.randn(shape[0], generator=make)
            for name, shape in shapes.items()
            if (bias if "spatial" in name else projection_bias)
        }

    def __call__(self, x, gate, scales, pooling="average"):
        return block(self.w, x, Form("", release, gate, scales=scales, pooling=pooling)).flatten(1, 2)


def write(path, twins, layout, prefix="", header=None, extra=None):
    tensors = {
        f"{prefix}{place}.conv1.{name}": tensor
        for place, twin in twins.items()
        for name, tensor in layout(twin.w).items()
    }
    tensors |= {f"{prefix}{name}": tensor for name, tensor in (extra or {}).items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, header)
    return path


def assert_same_outputs(checkpoint, twins, *form):
    for place, twin in twins.items():
        block = checkpoint.blocks[f"{place}.attn1"]
        for height, width in GRIDS:
            x = torch.randn(2, height, width, block.spec.dim, generator=torch.Generator().manual_seed(height))
            truth = twin(x, *form)
            got = block(x.flatten(1, 2), (height, width))
            assert relative_l2(got, truth) < 1e-5
