"""ΔConv Distill as tests run it, in ComfyUI's inference mode with every input a list."""

from __future__ import annotations

from typing import Any

import torch

from .comfy_models import conditioning, in_pack

QUICK = {
    "preset": "custom",
    "layer_steps": 2,
    "output_steps": 2,
    "learning_rate": 1e-3,
    "run_name": "test",
    "resume": "new run",
    "preview_every": 0,
}


def latents(*shapes: tuple[int, ...], seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """A LATENT of each shape."""
    generator = torch.Generator().manual_seed(seed)
    return [{"samples": torch.randn(shape, generator=generator)} for shape in shapes]


def distil(pack: Any, model: Any, data: Any = None, positive: Any = None, **changes: Any) -> Any:
    """The node's NodeOutput; without data, two pictures with one caption each."""
    node = in_pack(pack, "nodes.distill").Distill
    negative = changes.pop("negative", None)
    if data is None:
        data, positive = latents((1, 4, 16, 16), (1, 4, 16, 16)), [conditioning(1), conditioning(2)]
    with torch.inference_mode():
        lists = {name: [value] for name, value in (QUICK | changes).items()}
        return node.execute([model], data, positive, negative, **lists)


def weights(checkpoint: Any) -> dict[str, torch.Tensor]:
    """All weights of the blocks, by name."""
    return {
        f"{id}.{name}": tensor
        for id, block in checkpoint.blocks.items()
        for name, tensor in block.state_dict().items()
    }


def single_items():
    return latents(*[(1, 4, 16, 16)] * 3), [conditioning(i) for i in range(3)], 3
