"""Tiny MODELs of ComfyUI's own DiTs with joint attention of text and image."""

from __future__ import annotations

import inspect
from copy import deepcopy
from typing import Any

import torch

from .comfy_models import in_pack, make_model, sample

TEXT = 5  # tokens of text in `joint_conditioning`
WIDTH = 24  # of its embedding
FLUX: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 12,
    "context_in_dim": WIDTH,
    "hidden_size": 32,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [4, 6, 6],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": False,
}
LUMINA: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 16,
    "dim": 32,
    "cap_feat_dim": WIDTH,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 1,
    "qk_norm": True,
    "axes_dims": [4, 6, 6],
    "axes_lens": [300, 512, 512],
}


def make_joint(name: str) -> Any:
    """A ModelPatcher with random weights.

    Args:
        name: flux, flux_reference, flux2, flux2_reference, chroma, sd3, sd35 (two attentions in its first
            block), lumina2, z_image (tokens filled up to a multiple), qwen_image or qwen_image_masked (its
            text is padded).
    """
    import comfy.supported_models as models
    from comfy.ldm.chroma.model import ChromaParams
    from comfy.ldm.flux.model import FluxParams

    sd3 = {
        "in_channels": 16,
        "patch_size": 2,
        "depth": 2,
        "input_size": None,
        "adm_in_channels": 12,
        "num_patches": 1024,
        "pos_embed_max_size": 32,
        "pos_embed_scaling_factor": None,
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": WIDTH, "out_features": 128},
        },
    }
    qwen = {
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "axes_dims_rope": (4, 6, 6),
    }
    flux2 = FLUX | {"in_channels": 128, "out_channels": 128, "vec_in_dim": None, "patch_size": 1}
    flux2 |= {"axes_dim": [4, 4, 4, 4], "qkv_bias": False, "ops_bias": False, "global_modulation": True}
    flux2 |= {"mlp_silu_act": True, "default_ref_method": "index", "ref_index_scale": 10.0}
    chroma = FLUX | {"in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 32}
    chroma |= {"hidden_dim": 32, "n_layers": 2}
    config, unet = {
        "flux": (models.Flux, FLUX),
        "flux_reference": (models.Flux, FLUX),
        "flux2": (models.Flux2, flux2),
        "flux2_reference": (models.Flux2, flux2),
        "sd3": (models.SD3, sd3),
        "sd35": (models.SD3, sd3 | {"x_block_self_attn_layers": [0]}),
        "lumina2": (models.Lumina2, LUMINA),
        "z_image": (models.Lumina2, LUMINA | {"pad_tokens_multiple": 32}),
        "qwen_image": (models.QwenImage, qwen),
        "qwen_image_masked": (models.QwenImage, qwen),
        "chroma": (models.Chroma, chroma),
    }[name]
    params = {models.Flux: FluxParams, models.Flux2: FluxParams, models.Chroma: ChromaParams}.get(config)
    if params is not None:
        unet = unet | detected(params)
    if config is models.Chroma:
        unet = {name: unet[name] for name in ChromaParams.__annotations__}
    model = make_model(config(deepcopy(unet)))
    for buffer in model.model.diffusion_model.buffers():
        buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(0)))
    return model


def detected(params: Any) -> dict[str, Any]:
    """What ComfyUI's detection adds for FLUX in newer versions."""
    return {"txt_ids_dims": []} if "txt_ids_dims" in inspect.signature(params).parameters else {}


def joint_conditioning(name: str, seed: int = 1) -> list[Any]:
    """What a text encoder would give for this model; for those with a reference, with a picture of another
    size."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(1, TEXT, WIDTH, generator=generator)
    more = {"pooled_output": torch.randn(1, 12, generator=generator)}
    if name.endswith("_reference"):
        shape = (128, 3, 4) if name.startswith("flux2") else (16, 6, 8)
        more["reference_latents"] = [torch.randn(1, *shape, generator=generator)]
    if name == "qwen_image_masked":
        more["attention_mask"] = torch.tensor([[1, 1, 1, 0, 0]])
    if name in ("lumina2", "z_image"):
        more["attention_mask"] = torch.ones(1, TEXT, dtype=torch.long)
    return [[text, more]]


def sample_joint(model: Any, name: str, size: tuple[int, int] = (12, 16), **options: Any) -> torch.Tensor:
    """Latents from ComfyUI's sampler, with guidance; `size` is (H, W) in eighths of pixels."""
    shape = (16, 1, *size) if name.startswith("qwen") else (16, *size)
    if name.startswith("flux2"):
        shape = (128, *(-(-side // 2) for side in size))
    given = {"positive": joint_conditioning(name), "negative": joint_conditioning(name, seed=5)}
    return sample(model, **given | {"latent": torch.zeros(1, *shape), "steps": 2, "cfg": 3.0} | options)


def make_joint_mixers(pack: Any, model: Any, sites: Any = None, **spec: Any) -> Any:
    """Joint mixers for every attention of the model, or for some; with random parameters where they have
    kernels, else as they start."""
    core, joint = in_pack(pack, "deltaconv_core"), in_pack(pack, "deltaconv_core.mixers.joint")
    found = joint_sites(pack, model)
    mixers, heads = {}, found.heads
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for id, channels in found.channels.items():
            mixers[id] = joint.JointMixer(
                joint.JointSpec(channels, heads[id], channels // heads[id], **spec)
            ).requires_grad_(False)
            if mixers[id].spec.kernel_size:
                for parameter in mixers[id].parameters():
                    parameter.normal_(std=0.3)
    kept = {id: "it is cheap here" for id in mixers if sites is not None and id not in sites}
    blocks = {id: mixer for id, mixer in mixers.items() if id not in kept}
    return core.Checkpoint(found.architecture, blocks, metadata={"sizes": "6x8"}, kept=kept)


def joint_sites(pack: Any, model: Any) -> Any:
    """The joint attentions of a MODEL."""
    network = in_pack(pack, "nodes.host.model.sites").network_of(model)
    return in_pack(pack, "nodes.host.model.joint").find_joint_sites(network)


def with_joint(
    pack: Any, model: Any, checkpoint: Any, blocks: str = "all", end: float = 1.0, always: bool = True
) -> Any:
    """The MODEL with joint mixers, which run wherever they can unless `always` is False."""
    plan = in_pack(pack, "deltaconv_core.mixers.joint.plan").Plan(always)
    sampling = in_pack(pack, "deltaconv_core.sites.sampling_range").SamplingRange(0.0, end)
    apply = in_pack(pack, "nodes.host.patch.joint_mixers").apply_joint
    with torch.inference_mode():
        return apply(model, joint_sites(pack, model), checkpoint, blocks, sampling, plan=plan)[0]
