"""Small models with random weights in files that ComfyUI's own loaders take for the models of the workflows.

The networks are those of `comfy_architectures.py` and, of text and image together, of
`comfy_joint_models.py`: the real ones' classes, with few channels. ComfyUI tells models by their widths, so
`register` adds descriptions of the small ones to its list, and `load_encoder` stands in for the step that
would not know the small T5, which reads for Z-Image too. Text encoders are ComfyUI's classes with few
channels; the VAE is its small one (TAESD).
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import comfy.sd
import comfy.supported_models
import torch
from comfy.ldm.flux.model import FluxParams
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel
from comfy.sdxl_clip import SDXLClipModel, SDXLTokenizer
from comfy.supported_models_base import ClipTarget
from comfy.taesd.taesd import TAESD
from comfy.text_encoders.pixart_t5 import PixArtTokenizer
from comfy.text_encoders.t5 import T5
from safetensors.torch import save_file
from torch import Tensor

from deltaconv_core.sites import identify

from . import comfy_architectures
from .authors_block import published, random_weights, scaled_noise
from .comfy_joint_models import FLUX, LUMINA, detected
from .comfy_models import make_model

WIDTH = 16  # of every text encoder
POOLED_AND_SIZES = WIDTH + 6 * 256  # what SDXL's network is told beside the text
SDXL_SIZES = {"context_dim": 2 * WIDTH, "adm_in_channels": POOLED_AND_SIZES}
ARCHITECTURES = comfy_architectures.ARCHITECTURES | {
    "sdxl": replace(
        comfy_architectures.ARCHITECTURES["sdxl"],
        small={"model_channels": 32, "num_head_channels": 64, **SDXL_SIZES},
    )
}
JOINT: dict[str, dict[str, Any]] = {
    "flux": FLUX | {"vec_in_dim": WIDTH, "context_in_dim": WIDTH, "guidance_embed": True},
    "z_image": LUMINA | {"cap_feat_dim": WIDTH, "pad_tokens_multiple": 32},
}
CLIP_CONFIG = {
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "eos_token_id": 49407,
    "projection_dim": WIDTH,
}
T5_CONFIG = {
    "d_model": WIDTH,
    "d_ff": WIDTH,
    "d_kv": WIDTH,
    "num_heads": 1,
    "num_layers": 2,
    "vocab_size": 32128,
    "dense_act_fn": "gelu_pytorch_tanh",
    "is_gated_act": True,
    "model_type": "t5",
}


class SmallCLIP(SDClipModel):
    def __init__(self, **options: Any) -> None:
        super().__init__(textmodel_json_config=dict(CLIP_CONFIG), **options)


class SmallT5(SDClipModel):
    def __init__(self, **options: Any) -> None:
        tokens = {"end": 1, "pad": 0}
        super().__init__(
            textmodel_json_config=dict(T5_CONFIG), model_class=T5, special_tokens=tokens, **options
        )


class SmallSD1Encoder(SD1ClipModel):
    def __init__(self, **options: Any) -> None:
        super().__init__(clip_model=SmallCLIP, **options)


class SmallPixArtEncoder(SD1ClipModel):
    def __init__(self, **options: Any) -> None:
        super().__init__(name="t5xxl", clip_model=SmallT5, **options)


class SmallSDXLEncoder(SDXLClipModel):
    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
        torch.nn.Module.__init__(self)
        options = {"device": device, "dtype": dtype, "model_options": model_options or {}}
        self.clip_l, self.clip_g = (
            SmallCLIP(layer="hidden", layer_idx=-2, layer_norm_hidden_state=False, **options) for _ in "lg"
        )
        self.dtypes = {dtype}


class SmallSD15(comfy.supported_models.SD15):
    unet_config: ClassVar = comfy.supported_models.SD15.unet_config | ARCHITECTURES["sd15"].small

    def clip_target(self, state_dict: Any = None) -> ClipTarget:
        return ClipTarget(SD1Tokenizer, SmallSD1Encoder)


class SmallSDXL(comfy.supported_models.SDXL):
    unet_config: ClassVar = comfy.supported_models.SDXL.unet_config | {"model_channels": 32, **SDXL_SIZES}

    def clip_target(self, state_dict: Any = None) -> ClipTarget:
        return ClipTarget(SDXLTokenizer, SmallSDXLEncoder)


class SmallPixArt(comfy.supported_models.PixArtSigma):
    unet_config: ClassVar = comfy.supported_models.PixArtSigma.unet_config | {
        "depth": ARCHITECTURES["pixart_sigma"].small["depth"]
    }

    def __init__(self, unet_config: dict[str, Any]) -> None:
        # ComfyUI does not read PixArt's widths from the file.
        super().__init__(unet_config | ARCHITECTURES["pixart_sigma"].small)


class SmallFlux(comfy.supported_models.Flux):
    unet_config: ClassVar = {"image_model": "flux", "hidden_size": JOINT["flux"]["hidden_size"]}

    def __init__(self, unet_config: dict[str, Any]) -> None:
        # ComfyUI does not read heads and rotary embeddings from the file.
        super().__init__(unet_config | deepcopy(JOINT["flux"]) | detected(FluxParams))

    def clip_target(self, state_dict: Any = None) -> ClipTarget:
        return ClipTarget(SD1Tokenizer, SmallSD1Encoder)


class SmallZImage(comfy.supported_models.ZImage):
    unet_config: ClassVar = {"image_model": "lumina2", "dim": JOINT["z_image"]["dim"]}

    def __init__(self, unet_config: dict[str, Any]) -> None:
        super().__init__(unet_config | deepcopy(JOINT["z_image"]))


def load_encoder(state_dicts: list[dict[str, Tensor]], clip_type: Any, **options: Any) -> comfy.sd.CLIP:
    """Stands in for `comfy.sd.load_text_encoder_state_dicts`."""
    assert clip_type in (comfy.sd.CLIPType.PIXART, comfy.sd.CLIPType.LUMINA2)
    target = ClipTarget(PixArtTokenizer, SmallPixArtEncoder)
    clip = comfy.sd.CLIP(target, embedding_directory=options["embedding_directory"], parameters=0)
    missing, unexpected = clip.load_sd(state_dicts[0])
    assert not missing and not unexpected
    return clip


def register() -> None:
    """Has ComfyUI know the small models."""
    comfy.supported_models.models[:0] = [SmallSD15, SmallSDXL, SmallPixArt, SmallFlux, SmallZImage]
    comfy.sd.load_text_encoder_state_dicts = load_encoder


def write(files: dict[Path, str]) -> None:
    """Write the stand-ins for the models of the workflows.

    Args:
        files: where each shall be -> "sd15", "sdxl", "pixart_sigma", "flux", "z_image", "t5", "vae" or "ae".
    """
    torch.manual_seed(0)
    sources = {
        "sd15": lambda: checkpoint("sd15", small(SmallSD15, "sd15"), SmallSD1Encoder),
        "sdxl": lambda: checkpoint("sdxl", small(SmallSDXL, "sdxl"), SmallSDXLEncoder),
        "flux": lambda: checkpoint("flux", SmallFlux({}), SmallSD1Encoder),
        "z_image": lambda: network("z_image"),
        "pixart_sigma": lambda: network("pixart_sigma"),
        "t5": lambda: encoder(SmallPixArtEncoder, "t5xxl.transformer."),
        "vae": vae,
        "ae": lambda: vae(16),
    }
    with torch.no_grad():
        for path, name in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({key: tensor.contiguous() for key, tensor in sources[name]().items()}, path)


def small(description: Any, name: str) -> Any:
    return description(ARCHITECTURES[name].sized(small=True))


def checkpoint(name: str, config: Any, text_encoder: type) -> dict[str, Tensor]:
    """What a checkpoint file holds: network, text encoders, VAE."""
    # Each renames the keys of the dict that it is given.
    parts = (
        config.process_unet_state_dict_for_saving(dict(network(name))),
        config.process_clip_state_dict_for_saving(encoder(text_encoder)),
        config.process_vae_state_dict_for_saving(vae(config.latent_format.latent_channels)),
    )
    return {key: tensor for part in parts for key, tensor in part.items()}


@cache
def network(name: str) -> dict[str, Tensor]:
    """Weights under ComfyUI's own names."""
    if name in JOINT:
        config = {"flux": SmallFlux, "z_image": SmallZImage}[name]({})
        return dict(make_model(config).model.diffusion_model.state_dict())
    return dict(comfy_architectures.build(ARCHITECTURES[name], small=True).model.diffusion_model.state_dict())


def encoder(text_encoder: type, prefix: str = "") -> dict[str, Tensor]:
    """Weights of a text encoder, those under the prefix."""
    module = filled(text_encoder(dtype=torch.float32))
    weights = module.state_dict().items()
    return {key.removeprefix(prefix): tensor for key, tensor in weights if key.startswith(prefix)}


def vae(channels: int = 4) -> dict[str, Tensor]:
    model = filled(TAESD(latent_channels=channels))
    contrast = model.taesd_decoder(torch.randn(1, channels, 16, 16)).std()
    last = model.taesd_decoder[-1]
    last.weight *= 0.1 / contrast
    last.bias += 0.5  # around gray, so that few pixels are clipped
    return dict(model.state_dict())


def filled(module: torch.nn.Module) -> torch.nn.Module:
    """Random weights: ComfyUI leaves memory as it is where a file is to be loaded."""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(float(name.endswith("weight")))  # norms scale by 1
        elif parameter.ndim > 1:
            parameter.copy_(scaled_noise(parameter.shape))
    return module


def write_blocks(path: Path, name: str) -> str:
    """Write ΔConv weights for a small model as the authors publish them.

    Returns:
        What the small model is called: its name among architectures is made of its shape.
    """
    torch.manual_seed(sum(map(ord, path.name)))
    architecture, form = ARCHITECTURES[name], ARCHITECTURES[name].forms[0]
    places = comfy_architectures.attentions(architecture, small=True)
    blocks = {id: random_weights(place.channels, place.kernel_size, form) for id, place in places.items()}
    weights = network(name)
    names = comfy_architectures.convolutions(architecture, small=True)
    base = {id: scaled_noise(weights[place].shape) for id, place in names.items()}
    save_file(published(blocks, base, form), path)
    return identify({f"{id}.attn1": place.channels for id, place in places.items()})
