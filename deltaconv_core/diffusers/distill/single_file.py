"""Stable Diffusion in one file, as other programs keep it: which one it is, and what the file leaves out.

Such a file holds weights alone. The configurations of the three families are here (from the models'
published ones; what is not named is the default of diffusers or transformers), so no network is needed but
for CLIP's tokenizer.
"""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ...errors import DeltaConvError
from ...sites import ARCHITECTURES, UNet, known_heads
from ...util.text import listing
from ...weights.manifest import REPOSITORY

CONTEXT = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
FIRST = "model.diffusion_model.input_blocks.0.0.weight"
LATENT_CHANNELS = 4  # channels
TEXT_PREFIXES = ("cond_stage_model.", "conditioner.")
OLD_TEXT, TODAYS_TEXT = "cond_stage_model.transformer.", "text_model."
TOKENIZER = "openai/clip-vit-large-patch14"
TOKENS = 77

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}
CLIP_L = {
    "architectures": ["CLIPTextModel"],
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}
CLIP_H = {
    "architectures": ["CLIPTextModel"],
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}
CLIP_G = {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
XL_UNET = {
    "sample_size": 128,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
FAMILY_NAMES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}


def _unet(architecture: str) -> dict[str, Any]:
    """What `sites.ARCHITECTURES` knows of a U-Net, in diffusers' words."""
    shape = ARCHITECTURES[architecture]
    assert isinstance(shape, UNet)
    return {
        "_class_name": "UNet2DConditionModel",
        "block_out_channels": [level.channels for level in shape.down],
        "down_block_types": [
            "CrossAttnDownBlock2D" if level.depths else "DownBlock2D" for level in shape.down
        ],
        "up_block_types": ["CrossAttnUpBlock2D" if level.depths else "UpBlock2D" for level in shape.up],
        "transformer_layers_per_block": [max(level.depths, default=1) for level in shape.down],
        # Despite its name, the number of heads.
        "attention_head_dim": [known_heads(architecture, level.channels) for level in shape.down],
        "cross_attention_dim": shape.context_dim,
    }


# Width of the text embedding -> configurations of the parts.
FAMILIES: dict[int, dict[str, dict[str, Any]]] = {
    768: {
        "unet": _unet("sd15") | {"sample_size": 64},
        "vae": VAE | {"scaling_factor": 0.18215},
        "text_encoder": CLIP_L,
    },
    1024: {
        "unet": _unet("sd21") | {"sample_size": 96, "use_linear_projection": True},
        "vae": VAE | {"scaling_factor": 0.18215},
        "text_encoder": CLIP_H,
    },
    2048: {
        "unet": _unet("sdxl") | XL_UNET,
        "vae": VAE | {"scaling_factor": 0.13025},
        "text_encoder": CLIP_L,
        "text_encoder_2": CLIP_G,
    },
}


def check_ending(file: Path) -> None:
    """diffusers goes by the ending, and would open pickles.

    Raises:
        DeltaConvError: another one.
    """
    if file.suffix != ".safetensors":
        raise DeltaConvError(
            f"{file} does not end with .safetensors; only such files are opened, as others can run code: "
            "get the model in that form"
        )


def width_of(file: Path) -> int:
    """Width of the text embedding that a Stable Diffusion file was made for, which tells its family.

    Raises:
        DeltaConvError: another file.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            width = int(opened.get_slice(CONTEXT).get_shape()[-1])
    except (SafetensorError, OSError) as error:
        raise DeltaConvError(
            f"{file} is not a whole Stable Diffusion model in one file ({error}); for other models name the "
            "folder of a diffusers pipeline"
        ) from error
    if width not in FAMILIES:
        raise DeltaConvError(
            f"{file} is made for text embeddings of width {width}; built in are "
            f"{', '.join(map(str, FAMILIES))} (Stable Diffusion 1.x, 2.x, SDXL): name a diffusers "
            "folder of the same kind with --model-config"
        )
    return width


def check_parts(file: Path, width: int) -> None:
    """Refuses files whose parts ComfyUI knows and the built-in configurations do not, in our own words.

    Raises:
        DeltaConvError: with what the file holds or lacks.
    """
    with safe_open(file, framework="pt") as opened:
        names = set(opened.keys())
        shape = opened.get_slice(FIRST).get_shape() if FIRST in names else []
    channels = int(shape[1]) if len(shape) == 4 else LATENT_CHANNELS
    if channels != LATENT_CHANNELS:
        made = {8: "editing by instructions", 9: "inpainting"}.get(channels, "something else")
        raise DeltaConvError(
            f"{file} is made for {made}: its U-Net takes {channels} channels, not the "
            f"{LATENT_CHANNELS} of a latent; choose a model that makes pictures from text"
        )
    lacks = [
        f"no {part} (nothing under {' or '.join(prefixes)})"
        for part, prefixes in (("VAE", ("first_stage_model.",)), ("text encoder", TEXT_PREFIXES))
        if not any(name.startswith(prefixes) for name in names)
    ]
    if "edm_mean" in names or "edm_vpred.sigma_max" in names:
        lacks.append("noise levels of another kind (EDM, as in Playground 2.5), which this cannot learn from")
    if "scaled_fp8" in names or any(name.endswith((".scale_weight", ".comfy_quant")) for name in names):
        lacks.append("quantised weights, which only ComfyUI reads; take the file with float16 weights")
    if width == 1024 and any(name.startswith("conditioner.") for name in names):
        lacks.append("a text encoder under names of SDXL (conditioner.*), which ComfyUI alone reads")
    if lacks:
        raise DeltaConvError(
            f"diffusers cannot load {file}, a model of {FAMILY_NAMES[width]}: it has {'; '.join(lacks)}"
        )


def text_encoder(file: Path, folder: Path) -> dict[str, Any]:
    """The text encoder of a file of 2022, whose names lack `text_model.`: diffusers does not know them.

    ComfyUI renames them as this does (`SD15.process_clip_state_dict`).

    Args:
        file: with the weights.
        folder: with the configuration.

    Returns:
        It by the name of its part; nothing where the names are today's.

    Raises:
        DeltaConvError: weights are missing.
    """
    with safe_open(file, framework="pt") as opened:
        names = [name for name in opened.keys() if name.startswith(OLD_TEXT)]  # noqa: SIM118
        parts = [name.removeprefix(OLD_TEXT) for name in names]
        if all(part.startswith(TODAYS_TEXT) for part in parts):
            return {}
        weights = {part: opened.get_tensor(name) for name, part in zip(names, parts, strict=True)}
    from transformers import CLIPTextConfig, CLIPTextModel

    model = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
    # Newer versions of transformers leave it out, too.
    prefix = TODAYS_TEXT if any(name.startswith(TODAYS_TEXT) for name in model.state_dict()) else ""
    named = {f"{prefix}{part.removeprefix(TODAYS_TEXT)}": weight for part, weight in weights.items()}
    found = model.load_state_dict(named, strict=False)
    if missing := [name for name in found.missing_keys if not name.endswith("position_ids")]:
        raise DeltaConvError(f"{file}: its text encoder lacks {listing(missing)}; get the file again")
    return {"text_encoder": model}


def details(file: Path, width: int, prediction: str | None) -> dict[str, dict[str, Any]]:
    """In what a model differs from its family, by part.

    Files of SDXL models that predict v say so by a tensor named v_pred, and by one named ztsnr that their
    last timestep is noise alone; ComfyUI knows them by the same.

    Args:
        file, width: as `width_of` has taken and given them.
        prediction: what the user says that it predicts; tells SD 2.x of 512 pixels from that of 768.
    """
    if width == 1024 and prediction == "epsilon":
        return {"unet": {"sample_size": 64}}
    with safe_open(file, framework="pt") as opened:
        names = set(opened.keys())
    if "v_pred" not in names:
        return {}
    return {"scheduler": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": "ztsnr" in names}}


@contextmanager
def configuration(width: int, details: Mapping[str, Mapping[str, Any]]) -> Iterator[Path]:
    """A folder, for a while, with the configuration of a family, as diffusers' folders have it.

    Args:
        width: of the family.
        details: what is different, by part.
    """
    parts = FAMILIES[width]
    xl = "text_encoder_2" in parts
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline",
        "scheduler": ["diffusers", SCHEDULER["_class_name"]],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    if xl:
        index["tokenizer_2"] = index["tokenizer"]
    else:
        index["requires_safety_checker"] = False
    for name, config in parts.items():
        library = "diffusers" if "_class_name" in config else "transformers"
        index[name] = [library, config.get("_class_name") or config["architectures"][0]]
    with tempfile.TemporaryDirectory(prefix="deltaconv-") as made:
        folder = Path(made)
        _write(folder / "model_index.json", index)
        _write(folder / "scheduler" / "scheduler_config.json", {**SCHEDULER, **details.get("scheduler", {})})
        for name, config in parts.items():
            _write(folder / name / "config.json", _whole({**config, **details.get(name, {})}))
        try:
            yield folder
        except DeltaConvError as error:  # the folder is gone when this is read
            text = str(error).replace(str(folder), f"the built-in configuration of {FAMILY_NAMES[width]}")
            raise DeltaConvError(
                f"{text}; a folder of its own kind can be named with --model-config"
            ) from error


def tokenizers(width: int, folder: Path | None) -> dict[str, Any]:
    """CLIP's tokenizer for each text encoder of a family, by the name of its part.

    Args:
        width: of the family.
        folder: with vocab.json and merges.txt; None looks in the ComfyUI that this package was put into, then
            asks the Hugging Face Hub.

    Raises:
        DeltaConvError: there is none.
    """
    first: dict[str, Any] = {} if width != 1024 else {"pad_token": "!"}  # as their pipelines have it
    made = {"tokenizer": _tokenizer(folder, **first)}
    if "text_encoder_2" in FAMILIES[width]:
        made["tokenizer_2"] = _tokenizer(folder, pad_token="!")
    return made


def _tokenizer(folder: Path | None, **options: Any) -> Any:
    from transformers import CLIPTokenizer

    place: str | Path = folder or _of_comfyui() or TOKENIZER
    if folder is not None and not (folder / "merges.txt").is_file():
        raise DeltaConvError(f"expected CLIP's vocab.json and merges.txt in --tokenizer {folder}")
    try:
        return CLIPTokenizer.from_pretrained(place, model_max_length=TOKENS, **options)
    except (OSError, ValueError) as error:
        raise DeltaConvError(
            f"a model in one file has no tokenizer, and {place} cannot be loaded ({error}); name "
            "a folder with CLIP's with --tokenizer, such as ComfyUI/comfy/sd1_tokenizer"
        ) from error


def _of_comfyui() -> Path | None:
    """The tokenizer of the ComfyUI in whose custom_nodes the repository lies."""
    folder = REPOSITORY.parents[1] / "comfy" / "sd1_tokenizer"
    return folder if REPOSITORY.parent.name == "custom_nodes" and folder.is_dir() else None


def _whole(config: dict[str, Any]) -> dict[str, Any]:
    """With the defaults of its class, which diffusers' converters look up in the file."""
    if "_class_name" not in config:
        return config | {"model_type": "clip_text_model"}
    import diffusers

    known = inspect.signature(getattr(diffusers, config["_class_name"]).__init__).parameters.values()
    return {one.name: one.default for one in known if one.default is not one.empty} | config


def _write(file: Path, values: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(values), encoding="utf-8")
