"""Tiny MODELs of ComfyUI's own classes, blocks for them, and what tests do with both."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, ClassVar

import torch

CONTEXT_DIM = 16


def in_pack(pack: Any, module: str) -> Any:
    """A module of this repository as ComfyUI has it loaded, such as "nodes.host.model.sites"."""
    return import_module(f".{module}", pack.__name__)


def unet_config(channels: int = 4, **changes: Any) -> dict[str, Any]:
    """A U-Net of two levels with 5 sites: 32 channels in the first level, 64 in the second and the middle."""
    config = {
        "image_size": 32,
        "in_channels": channels,
        "out_channels": channels,
        "model_channels": 32,
        "num_res_blocks": [1, 1],
        "channel_mult": [1, 2],
        "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 0, 1, 0],
        "transformer_depth_middle": 1,
        "num_heads": -1,
        "num_head_channels": 16,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": True,
        "context_dim": CONTEXT_DIM,
        "num_classes": None,
        "adm_in_channels": None,
        "legacy": False,
    }
    return config | changes


def make_unet(
    dtype: torch.dtype = torch.float32, manual_cast: torch.dtype | None = None, **changes: Any
) -> Any:
    """A ModelPatcher with random weights, always the same ones; `changes` go to `unet_config`."""
    import comfy.latent_formats
    import comfy.supported_models_base

    class Latent(comfy.latent_formats.LatentFormat):
        latent_channels = changes.get("channels", 4)
        scale_factor = 40.0 if latent_channels == 3 else 1.0  # so that few pixels of a picture are clipped

    class Tiny(comfy.supported_models_base.BASE):
        unet_extra_config: ClassVar[dict[str, Any]] = {}
        memory_usage_factor = 1.0
        latent_format = Latent

    return make_model(Tiny(unet_config(**changes)), dtype, manual_cast)


def make_pixart(dtype: torch.dtype = torch.float32) -> Any:
    """A PixArt of two blocks with 48 channels. Its latents must be larger than 32 on average, and even."""
    import comfy.supported_models

    class TinyPixArt(comfy.supported_models.PixArtSigma):
        memory_usage_factor = 1.0

    config = {
        "input_size": 64,
        "hidden_size": 48,
        "depth": 2,
        "num_heads": 4,
        "caption_channels": CONTEXT_DIM,
    }
    config |= {"model_max_length": 8, "micro_condition": False, "pe_interpolation": 1}
    return make_model(TinyPixArt(config), dtype, None)


def make_model(
    config: Any, dtype: torch.dtype = torch.float32, manual_cast: torch.dtype | None = None
) -> Any:
    """A ModelPatcher of one of ComfyUI's model descriptions, with random weights, always the same ones."""
    import comfy.model_management
    import comfy.model_patcher

    config.set_inference_dtype(dtype, manual_cast)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = config.get_model({}, "", device=torch.device("cpu"))
        for parameter in model.diffusion_model.parameters():
            value = torch.randn(parameter.shape) * 0.3 / max(1, parameter[0].numel()) ** 0.5
            if parameter.ndim == 1:
                value += 1
            parameter.data.copy_(value)
            parameter.requires_grad_(False)
    devices = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    patcher_class = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return patcher_class(model, *devices)


def make_checkpoint(pack: Any, model: Any, kernel_size: int = 3, **spec: Any) -> Any:
    """Random blocks for every site of the model, with outputs as large as the attention's."""
    core = in_pack(pack, "deltaconv_core")
    found = in_pack(pack, "nodes.host.model.sites").find_sites(model)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        blocks = {
            id: core.DeltaConvBlock(core.BlockSpec(n, kernel_size, **spec))
            for id, n in found.channels.items()
        }
        for block in blocks.values():
            block.requires_grad_(False)
            block.conv_out.weight *= 20
            block.conv_pool.weight *= 20
    return core.Checkpoint(found.architecture, blocks)


def make_hybrids(pack: Any, model: Any, sites: Collection[str] | None = None, **spec: Any) -> Any:
    """Hybrid mixers for every site of the model, or for some; with random parameters where they have
    kernels, else as they start."""
    core, hybrid = in_pack(pack, "deltaconv_core"), in_pack(pack, "deltaconv_core.mixers.hybrid")
    found, attend = in_pack(pack, "nodes.host.model.sites").find_sites(model), "nodes.host.model.attend"
    mixers = {}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for id, site in found.sites.items():
            heads = in_pack(pack, attend).heads_of(model, site)
            mixers[id] = hybrid.HybridMixer(
                hybrid.HybridSpec(site.channels, heads, site.channels // heads, **spec)
            )
            if "kernel_size" in spec:
                for parameter in mixers[id].requires_grad_(False).parameters():
                    parameter.normal_(std=0.3)
    kept = {id: "it is cheap here" for id in mixers if sites is not None and id not in sites}
    return core.Checkpoint(found.architecture, {i: m for i, m in mixers.items() if i not in kept}, kept=kept)


def patch(pack: Any, model: Any, checkpoint: Any, blocks: str = "all", **options: Any) -> Any:
    """The MODEL out of ΔConv Patch Model."""
    return run_patch_node(pack, model, checkpoint, blocks, **options).args[0]


def run_patch_node(
    pack: Any,
    model: Any,
    checkpoint: Any,
    blocks: str = "all",
    start: float = 0.0,
    end: float = 1.0,
    base_weights: str = "apply",
    strength: float = 1.0,
) -> Any:
    """ΔConv Patch Model's NodeOutput, run as ComfyUI's executor runs it."""
    node = in_pack(pack, "nodes.patch_model").PatchModel
    with torch.inference_mode():
        return node.execute(model, "auto", blocks, start, end, base_weights, strength, checkpoint)


def wrapped_by_compile(model: Any) -> Any:
    """As other packs do: the wrapper of torch.compile in the place of the network."""
    clone = model.clone()
    network = clone.get_model_object("diffusion_model")
    clone.add_object_patch("diffusion_model", torch.compile(network, backend="eager"))
    return clone


def by_hand(model: Any, checkpoint: Any) -> Any:
    """The model with the checkpoint's blocks at every site, put there for good and without our host code."""
    network = model.model.diffusion_model
    if hasattr(network, "blocks"):
        for i, block in enumerate(network.blocks):
            trained = checkpoint.blocks[f"transformer_blocks.{i}.attn1"]
            answer = _by_hand(block.attn, trained)
            block.attn.forward = lambda x, HW, answer=answer, **_: answer(x, (HW[0] // 2, HW[1] // 2))
    else:
        places = {
            "down_blocks.0.attentions.0": network.input_blocks[1][1],
            "down_blocks.1.attentions.0": network.input_blocks[3][1],
            "mid_block.attentions.0": network.middle_block[1],
            "up_blocks.0.attentions.1": network.output_blocks[1][1],
            "up_blocks.1.attentions.1": network.output_blocks[3][1],
        }
        for name, transformer in places.items():
            trained = checkpoint.blocks[f"{name}.transformer_blocks.0.attn1"]
            attention = transformer.transformer_blocks[0].attn1
            answer = _by_hand(attention, trained)
            attention.forward = lambda x, transformer_options, answer=answer, **_: answer(
                x, tuple(transformer_options["activations_shape"][-2:])
            )
    return model


def _by_hand(attention: Any, trained: Any) -> Callable[[torch.Tensor, tuple[int, int]], torch.Tensor]:
    """A block, or a hybrid mixer between the attention's layers, which are called one by one."""
    if trained.kind != "hybrid":
        return trained

    def run(x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        if hasattr(attention, "qkv"):
            parts, out = attention.qkv(x).chunk(3, dim=2), attention.proj
        else:
            parts = [layer(x) for layer in (attention.to_q, attention.to_k, attention.to_v)]
            out = attention.to_out
        by_head = [part.unflatten(2, (trained.spec.heads, -1)).transpose(1, 2) for part in parts]
        return out(trained(*by_head, grid).transpose(1, 2).flatten(2))

    return run


def state(model: Any) -> dict[str, torch.Tensor]:
    """A copy of the base model's weights."""
    return {key: value.clone() for key, value in model.model.state_dict().items()}


def same_state(before: dict[str, torch.Tensor], model: Any) -> bool:
    """Whether the base model's weights are bit-identical to a copy taken before."""
    now = model.model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[key], before[key]) for key in before)


@contextmanager
def untouched(model: Any, size: tuple[int, int]) -> Iterator[None]:
    """What happens inside leaves a MODEL with the same forwards, patches, pictures of this size, and bits."""
    before, expected = state(model), sample(model, size)
    patches, wrappers = dict(model.object_patches), dict(model.wrappers)
    yield
    for name, module in model.model.named_modules():
        own = type(module).forward.__get__(module)
        assert module.__dict__.get("forward", own) == own, name
    assert (model.object_patches, model.wrappers) == (patches, wrappers)
    assert torch.equal(sample(model, size), expected)
    model.detach()
    assert same_state(before, model)


def conditioning(seed: int = 0, length: int = 5) -> list[Any]:
    """What a text encoder would give."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, length, CONTEXT_DIM, generator=generator), {}]]


def sample(model: Any, size: tuple[int, int] = (16, 16), **options: Any) -> torch.Tensor:
    """Latents from ComfyUI's sampler, run as its executor runs nodes."""
    import comfy.sample

    options = {
        "steps": 3,
        "cfg": 4.0,
        "batch": 1,
        "sampler": "euler",
        "denoise": 1.0,
        "positive": conditioning(1),
        "negative": conditioning(2),
        "latent": None,
        "mask": None,
    } | options
    latent = options["latent"]
    if latent is None:
        latent = torch.zeros(options["batch"], 4, *size)
    noise = comfy.sample.prepare_noise(latent, seed=3)
    with torch.inference_mode():
        return comfy.sample.sample(
            model,
            noise,
            options["steps"],
            options["cfg"],
            options["sampler"],
            "normal",
            options["positive"],
            options["negative"],
            latent,
            denoise=options["denoise"],
            noise_mask=options["mask"],
            disable_pbar=True,
            seed=3,
        )


def called(node: Any, method: str, *args: Any) -> Any:
    """The first output of one of ComfyUI's nodes, whichever of its two interfaces it has."""
    return node.execute(*args)[0] if hasattr(node, "execute") else getattr(node(), method)(*args)[0]
