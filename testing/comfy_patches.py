"""What users put on a MODEL beside ΔConv, by ComfyUI's own nodes and loaders."""

from __future__ import annotations

from typing import Any

import torch

from .comfy_models import called, make_unet

Model = Any  # a ModelPatcher


def lora(model: Model) -> Model:
    """A LoRA for self-attention, cross-attention and convolutions, by ComfyUI's own loader."""
    import comfy.sd

    generator = torch.Generator().manual_seed(11)
    weights = {}
    for key, weight in model.model.state_dict().items():
        if key.endswith((".to_q.weight", ".to_v.weight", ".to_out.0.weight", ".in_layers.2.weight")):
            name = "lora_unet_" + key.removeprefix("diffusion_model.").removesuffix(".weight").replace(
                ".", "_"
            )
            down = torch.randn(4, *weight.shape[1:], generator=generator) * 0.2
            up = torch.randn(weight.shape[0], 4, *[1] * (weight.ndim - 2), generator=generator) * 0.2
            weights |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    patched = comfy.sd.load_lora_for_models(model, None, weights, 0.8, 0.0)[0]
    assert len(patched.patches) >= len(weights) // 2
    return patched


def attn2_patch(model: Model) -> Model:
    """As IPAdapter once did: more keys and values for cross-attention."""

    def add_tokens(n, context, value, options):
        extra = torch.ones_like(context) * 0.3
        return n, torch.cat([context, extra], dim=1), torch.cat([value, extra], dim=1)

    clone = model.clone()
    clone.set_model_attn2_patch(add_tokens)
    return clone


def attn2_replace(model: Model) -> Model:
    """As IPAdapter does."""
    from comfy.ldm.modules.attention import optimized_attention

    def more(q, k, v, options):
        heads = options["n_heads"]
        return optimized_attention(q, k, v, heads) + 0.5 * optimized_attention(q, k.flip(1), v, heads)

    clone = model.clone()
    clone.set_model_attn2_replace(more, "middle", 0, 0)
    clone.set_model_attn2_replace(more, "output", 1)
    return clone


def free_u(model: Model) -> Model:
    from comfy_extras.nodes_freelunch import FreeU_V2

    return called(FreeU_V2, "patch", model, 1.3, 1.4, 0.9, 0.2)


def deep_shrink(model: Model) -> Model:
    """Kohya's: a smaller grid inside the network for the first part of the sampling."""
    from comfy_extras.nodes_model_downscale import PatchModelAddDownscale

    return called(PatchModelAddDownscale, "patch", model, 3, 2.0, 0.0, 0.5, True, "bicubic", "bicubic")


def pag(model: Model) -> Model:
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    return called(PerturbedAttentionGuidance, "patch", model, 2.0)


def sag(model: Model) -> Model:
    from comfy_extras.nodes_sag import SelfAttentionGuidance

    return called(SelfAttentionGuidance, "patch", model, 0.5, 2.0)


def rescale_cfg(model: Model) -> Model:
    from comfy_extras.nodes_model_advanced import RescaleCFG

    return called(RescaleCFG, "patch", model, 0.7)


def v_prediction(model: Model) -> Model:
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    return called(ModelSamplingDiscrete, "patch", model, "v_prediction", True)


def compiled(model: Model) -> Model:
    """As TorchCompileModel does, with a backend that needs no compiler."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    clone = model.clone()
    set_torch_compile_wrapper(clone, backend="eager")
    return clone


def merged(model: Model) -> Model:
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    other = make_unet()
    for parameter in other.model.parameters():
        parameter.mul_(0.9)
    return called(ModelMergeSimple, "merge", model, other, 0.6)
