"""An independent block as the authors describe theirs, and files of it in every layout of theirs."""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from .compare import relative_l2

DOWN = "down_blocks.0.attentions.0.transformer_blocks.0"
MID = "mid_block.attentions.0.transformer_blocks.0"
RESNET = "down_blocks.0.resnets.0.conv1"
GRIDS = [(8, 6), (7, 5), (9, 11)]


class Twin:
    """The authors' block by the description of their code: (B, H, W, C), plain PyTorch, weights in a dict."""

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
        batch, height, width, dim = x.shape
        w = self.w
        z = F.linear(x, w["conv_up.weight"], w.get("conv_up.bias")).permute(0, 3, 1, 2)
        inter = z.shape[1]
        stages = []
        for i, scale in enumerate(scales):
            f = z
            if scale != 1 and pooling == "average":
                f = F.adaptive_avg_pool2d(f, (int(height * scale), int(width * scale)))
            elif scale != 1:
                f = F.interpolate(f, scale_factor=scale, mode="bilinear", align_corners=False)
            kernel = w[f"gates.{i}.conv_spatial.weight"]
            f = F.conv2d(
                f, kernel, w.get(f"gates.{i}.conv_spatial.bias"), padding=kernel.shape[-1] // 2, groups=inter
            )
            a, b = f[:, : inter // 2], f[:, inter // 2 :]
            f = a * b * (inter / 2) ** 0.5 if gate == "simple" else a * torch.sigmoid(b)
            if scale != 1:
                f = F.interpolate(f, size=(height, width), mode="bilinear", align_corners=False)
            stages.append(f)
        y = F.linear(torch.cat(stages, 1).permute(0, 2, 3, 1), w["conv_out.weight"], w.get("conv_out.bias"))
        mean = F.linear(x.mean(dim=(1, 2), keepdim=True), w["conv_pool.weight"], w.get("conv_pool.bias"))
        return (y + mean).reshape(batch, height * width, dim)


def release(w):
    """Kernels as [K, K, channels], projections as Linear."""
    return {
        n: t[:, 0].permute(1, 2, 0).contiguous() if n.endswith("spatial.weight") else t for n, t in w.items()
    }


def conv2d(w):
    """Kernels as [channels, 1, K, K], projections as 1x1 convolutions."""
    return {n: t[:, :, None, None] if t.ndim == 2 else t for n, t in w.items()}


def earlier(w):
    """Two stages by name, everything a convolution."""
    names = {"gates.0.conv_spatial": "conv_spatial", "gates.1.conv_spatial": "conv_spatial_low"}
    return {
        f"{names.get(n.rpartition('.')[0], n.rpartition('.')[0])}.{n.rpartition('.')[2]}": t
        for n, t in conv2d(w).items()
    }


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
