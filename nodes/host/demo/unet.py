"""The demo model as ComfyUI sees it: a small U-Net of ComfyUI's own classes that works on RGB pixels.

The network is :class:`comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel` with self- and cross-
attention, run on 2x2 patches (pixel unshuffle), so that a 48x48 picture costs as much as a 24x24 latent. It
predicts the clean picture (ComfyUI's "x0"), which is easy where pictures are flat areas with sharp edges,
on DDPM's linear schedule, whose last sigma (157) hides even the mean colour of a picture.
"""

from __future__ import annotations

from typing import Any, ClassVar

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from safetensors import safe_open
from torch.nn import functional as F

PATCH = 2
CONTEXT_DIM = 64

UNET_CONFIG: dict[str, Any] = {
    "image_size": 24,
    "in_channels": 3 * PATCH**2,
    "out_channels": 3 * PATCH**2,
    "model_channels": 64,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 2, 2],
    "transformer_depth": [1, 1, 1],
    "transformer_depth_output": [0, 1, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "num_heads": -1,
    "num_head_channels": 32,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "context_dim": CONTEXT_DIM,
    "num_classes": None,
    "adm_in_channels": None,
    "legacy": False,
}


JOINT_CONFIG: dict[str, Any] = {
    "patch_size": 3,
    "in_channels": 3,
    "dim": 256,
    "n_layers": 4,
    "n_refiner_layers": 1,
    "n_heads": 8,
    "multiple_of": 32,
    "ffn_dim_multiplier": 2.0,
    "qk_norm": True,
    "cap_feat_dim": CONTEXT_DIM,
    "axes_dims": [8, 12, 12],
    "axes_lens": [64, 512, 512],
    "rope_theta": 256.0,
    "z_image_modulation": True,
    "pad_tokens_multiple": 8,
}
"""Z-Image's settings in small."""


class PixelLatent(comfy.latent_formats.LatentFormat):
    """RGB in [-1, 1] at the picture's own size: what ComfyUI's ``pixel_space`` VAE encodes to and decodes
    from."""

    latent_channels = 3
    spacial_downscale_ratio = 1
    latent_rgb_factors: ClassVar = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


class PatchedUNet(UNetModel):
    """ComfyUI's U-Net on 2x2 patches of its input; any height and width (the border is repeated to fill a
    patch)."""

    def _forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        height, width = x.shape[-2:]
        padded = F.pad(x, (0, -width % PATCH, 0, -height % PATCH), mode="replicate")
        out = super()._forward(F.pixel_unshuffle(padded, PATCH), *args, **kwargs)
        return F.pixel_shuffle(out, PATCH)[..., :height, :width]


class PixelSampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.X0):
    """Discrete noise levels, and a network whose output is the clean picture."""


class DemoConfig(comfy.supported_models_base.BASE):
    """ComfyUI's description of the demo model."""

    unet_config: ClassVar[dict[str, Any]] = {}
    unet_extra_config: ClassVar[dict[str, Any]] = {}
    latent_format = PixelLatent
    memory_usage_factor = 1.0
    supported_inference_dtypes: ClassVar = [torch.float32]
    # "sqrt_linear" is ComfyUI's name for betas that grow linearly, as in DDPM
    sampling_settings: ClassVar = {
        "beta_schedule": "sqrt_linear",
        "linear_start": 0.0001,
        "linear_end": 0.02,
        "timesteps": 1000,
    }

    def __init__(self, network: dict[str, Any] = UNET_CONFIG) -> None:
        super().__init__({key: list(v) if isinstance(v, list) else v for key, v in network.items()})

    def get_model(
        self, state_dict: dict[str, Any], prefix: str = "", device: Any = None
    ) -> comfy.model_base.BaseModel:
        model = comfy.model_base.BaseModel(self, device=device, unet_model=PatchedUNet)
        model.model_sampling = PixelSampling(self)
        return model.eval()


class JointConfig(DemoConfig):
    """ComfyUI's description of the demo model whose attention is joint."""

    def __init__(self) -> None:
        super().__init__(JOINT_CONFIG)

    def get_model(
        self, state_dict: dict[str, Any], prefix: str = "", device: Any = None
    ) -> comfy.model_base.BaseModel:
        model = comfy.model_base.Lumina2(self, device=device)
        # Nothing runs through it, and newer hosts have dropped it.
        vars(model.diffusion_model)["_modules"].pop("norm_final", None)
        model.model_sampling = PixelSampling(self)
        return model.eval()


CONFIGS: dict[str, type[DemoConfig]] = {"unet": DemoConfig, "joint": JointConfig}
"""The demo's networks: ComfyUI's U-Net, and its NextDiT."""


def load_demo_model(path: str, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """Build the demo MODEL in fp32 from the safetensors file at ``path``, of whichever network.

    ``disable_dynamic`` is part of newer hosts' contract for ``cached_patcher_init``: they rebuild a model
    with it.
    """
    file = comfy.utils.load_torch_file(path)
    config = CONFIGS["joint" if "unet.x_embedder.weight" in file else "unet"]()
    load_device = comfy.model_management.get_torch_device()
    manual_cast = comfy.model_management.unet_manual_cast(
        torch.float32, load_device, config.supported_inference_dtypes
    )
    config.set_inference_dtype(torch.float32, manual_cast)
    offload_device = comfy.model_management.unet_offload_device()
    model = config.get_model({}, device=offload_device)
    plain = comfy.model_patcher.ModelPatcher
    patcher_class = plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)
    patcher = patcher_class(model, load_device=load_device, offload_device=offload_device)
    weights = {k: v.float() for k, v in file.items() if k.startswith("unet.")}
    assign = {"assign": True} if getattr(patcher, "is_dynamic", lambda: False)() else {}
    model.load_model_weights(weights, "unet.", **assign)
    patcher.cached_patcher_init = (load_demo_model, (path,))
    return patcher


def load_words(path: str) -> torch.Tensor:
    """The embedding of every word, (rows of demo.words.VOCABULARY, CONTEXT_DIM) in fp32, from the model's
    file."""
    with safe_open(path, "pt") as file:
        return file.get_tensor("words.weight").float()
