"""Multiply-adds of whole networks of text and image at several sizes: attention, joint mixers, the bound.

    python -m benchmarks.joint_networks [--model flux ...] [--size 1024 2048 4096]

ComfyUI's own networks at their real sizes on PyTorch's "meta" device, where nothing is computed: one pass of
one picture. Matrix products and convolutions are counted by PyTorch, attentions by the shapes that they are
called with. The bound is a network whose image tokens see each other for free, which nothing that keeps the
rest can beat. Mixers are of the default form, 256 landmarks and kernels of 9 x 9, wherever there is an image.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaconv_core import bench
from deltaconv_core.mixers.joint import JointSpec
from deltaconv_core.mixers.joint.flops import joint_flops
from deltaconv_core.util.text import markdown
from scripts import comfy_host

from .harness import parser

SIZES = ("1024", "2048", "4096")
PIXELS = 16  # of a token's side: 8 of a latent pixel, 2 of which make a token


@dataclass(frozen=True)
class Counted:
    """Multiply-adds of one pass.

    Args:
        rest: all that is not attention between the projections.
        attention: as it is.
        exact: of it, what is not of the image's tokens to each other.
        mixed: with joint mixers.
    """

    rest: int
    attention: int
    exact: int
    mixed: int

    @property
    def whole(self) -> int:
        return self.rest + self.attention


def flux() -> tuple[torch.nn.Module, dict[str, Any]]:
    """FLUX.1-dev, 512 tokens of text."""
    from comfy.ldm.flux.model import Flux

    network = Flux(
        in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=4096, hidden_size=3072, mlp_ratio=4.0,
        num_heads=24, depth=19, depth_single_blocks=38, axes_dim=[16, 56, 56], theta=10000, patch_size=2,
        qkv_bias=True, guidance_embed=True, **_made(),
    )  # fmt: skip
    return network, {"context": _meta(1, 512, 4096), "y": _meta(1, 768), "guidance": _meta(1)}


def z_image() -> tuple[torch.nn.Module, dict[str, Any]]:
    """Z-Image, 128 tokens of text."""
    from comfy.ldm.lumina.model import NextDiT

    network = NextDiT(
        patch_size=2, in_channels=16, dim=3840, n_layers=30, n_refiner_layers=2, n_heads=30, n_kv_heads=30,
        ffn_dim_multiplier=8.0 / 3.0, norm_eps=1e-5, qk_norm=True, cap_feat_dim=2560, axes_dims=[32, 48, 48],
        axes_lens=[1536, 512, 512], rope_theta=256.0, z_image_modulation=True, time_scale=1000.0,
        pad_tokens_multiple=32, **_made(),
    )  # fmt: skip
    return network, {"context": _meta(1, 128, 2560), "num_tokens": 128}


def qwen_image() -> tuple[torch.nn.Module, dict[str, Any]]:
    """Qwen-Image, 256 tokens of text."""
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(num_layers=60, **_made()), {"context": _meta(1, 256, 3584)}


def sd35_medium() -> tuple[torch.nn.Module, dict[str, Any]]:
    """Stable Diffusion 3.5 Medium, 333 tokens of text; two attentions in 13 of 24 blocks."""
    from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT

    network = MMDiT(
        input_size=None, patch_size=2, in_channels=16, depth=24, adm_in_channels=2048, qk_norm="rms",
        pos_embed_scaling_factor=None, pos_embed_max_size=384, num_patches=384**2,
        x_block_self_attn_layers=list(range(13)),
        context_embedder_config={
            "target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}
        },
        **_made(),
    )  # fmt: skip
    return network, {"context": _meta(1, 333, 4096), "y": _meta(1, 2048)}


NETWORKS: dict[str, Callable[[], tuple[torch.nn.Module, dict[str, Any]]]] = {
    "flux": flux,
    "z_image": z_image,
    "qwen_image": qwen_image,
    "sd35_medium": sd35_medium,
}
WITH_FRAMES = ("qwen_image",)


def main() -> int:
    command = parser(__doc__)
    command.add_argument("--model", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="MODEL")
    command.add_argument("--size", nargs="+", default=list(SIZES), help="of the picture, such as 1024x576")
    args = command.parse_args()
    comfy_host.import_comfy()
    lines = []
    for name in args.model:
        network, given = NETWORKS[name]()
        for width, height in map(bench.parse_size, args.size):
            frames = (1,) if name in WITH_FRAMES else ()
            counted = count(network, given, (height // PIXELS, width // PIXELS), frames)
            lines.append({"model": name, "size": f"{width} x {height}"} | cells(counted))
    print("\n".join(markdown(lines)))
    return 0


@torch.no_grad()
def count(
    network: torch.nn.Module, given: dict[str, Any], grid: tuple[int, int], frames: tuple[int, ...] = ()
) -> Counted:
    """What one pass takes for an image of this grid of tokens; latents have `frames` before it."""
    image = grid[0] * grid[1]
    calls: list[tuple[int, int, int, int]] = []

    def noted(
        attention: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **more: Any
    ) -> Tensor:
        split = more.get("skip_reshape", False)
        queries, keys, inner = (
            (q.shape[2], k.shape[2], heads * q.shape[3]) if split else (q.shape[1], k.shape[1], q.shape[2])
        )
        calls.append((queries, keys, heads, inner))
        return q.new_empty(len(q), queries, inner)

    options = {"optimized_attention_override": noted}
    latent = _meta(1, 16, *frames, 2 * grid[0], 2 * grid[1])
    rest = bench.count_flops(lambda: network(latent, _meta(1), transformer_options=options, **given))
    attention = exact = mixed = 0
    for queries, keys, heads, inner in calls:
        whole = 4 * queries * keys * inner
        has_image = queries >= image
        attention += whole
        exact += whole - 4 * image**2 * inner if has_image else whole
        spec = JointSpec(inner, heads, inner // heads)
        mixed += joint_flops(spec, grid, queries - image) if has_image else whole
    return Counted(rest // 2, attention // 2, exact // 2, mixed // 2)


def cells(counted: Counted) -> dict[str, str]:
    """Of a line of the table."""
    bound, ours = counted.rest + counted.exact, counted.rest + counted.mixed
    among = counted.attention - counted.exact
    return {
        "TMAC": f"{counted.whole / 1e12:.1f}",
        "attention": f"{counted.attention / counted.whole:.1%}",
        "image to image": f"{among / counted.whole:.1%}",
        "bound, TMAC": f"{bound / 1e12:.1f}",
        "mixers, TMAC": f"{ours / 1e12:.1f}",
        "bound": f"{counted.whole / bound:.2f} x",
        "mixers": f"{counted.whole / ours:.2f} x",
    }


def _made() -> dict[str, Any]:
    import comfy.ops

    return {"device": "meta", "dtype": torch.bfloat16, "operations": comfy.ops.disable_weight_init}


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta", dtype=torch.bfloat16)


if __name__ == "__main__":
    sys.exit(main())
