"""The teacher: a diffusers pipeline, loaded from a folder or out of one file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...distill import session
from ...errors import DeltaConvError
from ..pipeline_folder import (
    ONLY_SAFETENSORS,
    check_vocabularies,
    dtype_argument,
    load_pipeline,
    loading,
    read_index,
)
from ..sites import Sites, find_sites, network_of
from . import single_file
from .families import Family, family_of
from .options import PREDICTIONS, Options

NOT_NEEDED = ("safety_checker", "feature_extractor", "image_encoder")


@dataclass(frozen=True)
class Source:
    """Where a model comes from; fields as in `Options`, which may stand in for it."""

    model: Path
    variant: str | None = None
    model_config: Path | None = None
    tokenizer: Path | None = None
    prediction: str | None = None


@dataclass
class Teacher:
    """A pipeline and what training has to know of it.

    Args:
        pipeline: in evaluation mode, on the CPU; its VAE is in float32.
        network: the U-Net or transformer.
        family: how its network is called.
        sites: its self-attentions.
        alphas: (T,) cumulated alpha of the trained timesteps, the signal's share of the variance.
        prediction: "epsilon" or "v".
    """

    pipeline: Any
    network: Any
    family: Family
    sites: Sites
    alphas: Tensor
    prediction: str

    @property
    def factor(self) -> int:
        """Pixels of the picture for one of the latent, along each side."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def step(self) -> int:
        """Pixels of which heights and widths must be multiples, so that no level or patch is cut."""
        config = self.network.config
        inside = config.patch_size if "patch_size" in config else 1 << (self.levels - 1)
        return self.factor * int(inside)

    @property
    def resolution(self) -> int:
        """Side in pixels of the squares that it was made for."""
        size = self.network.config.sample_size
        return self.factor * int(max(size) if isinstance(size, (list, tuple)) else size)

    @property
    def schedule(self) -> str:
        """Differs for other alphas."""
        return session.fingerprint([str(self.alphas.tolist())])

    @property
    def levels(self) -> int:
        """Of a U-Net; 0 for a transformer."""
        return len(getattr(self.network, "up_blocks", ()))

    def free(self) -> None:
        """Forgets all parts but the network."""
        self.pipeline = None


def load_teacher(options: Options | Source, dtype: torch.dtype) -> Teacher:
    """Loads the teacher that the options name.

    Args:
        options: of the run, or the model alone.
        dtype: of its weights; the VAE's are float32.

    Raises:
        DeltaConvError: a model that cannot be loaded, or not be learned from.
    """
    _check_libraries()
    pipeline = (_from_folder if os.path.isdir(options.model) else _from_file)(options, dtype)
    pipeline.set_progress_bar_config(disable=True)
    network: Any = network_of(pipeline)
    if getattr(pipeline, "vae", None) is None or pipeline.vae.config.get("latents_mean") is not None:
        raise DeltaConvError(
            f"this teacher ({type(pipeline).__name__}) has another kind of latents than Stable Diffusion and "
            "PixArt have, which distill does not support"
        )
    alphas, prediction = _noise(pipeline.scheduler, options.prediction)
    if network.dtype != dtype:  # a single file's weights come as they are stored
        network.to(dtype)
    for part in (pipeline.vae, *(text_encoders(pipeline) if dtype == torch.float32 else ())):
        part.float()
    for part in (network, pipeline.vae, *text_encoders(pipeline)):
        part.eval().requires_grad_(False)
    return Teacher(pipeline, network, family_of(pipeline, network), find_sites(network), alphas, prediction)


def text_encoders(pipeline: Any) -> list[nn.Module]:
    """All that a pipeline has."""
    names = ("text_encoder", "text_encoder_2")
    return [part for name in names if (part := getattr(pipeline, name, None)) is not None]


def weights_fingerprint(*modules: nn.Module) -> str:
    """Differs for other weights: a digest of the first values of each."""
    return session.fingerprint(
        f"{name} {tuple(weight.shape)} {weight.dtype} {session.first_values(weight)}"
        for module in modules
        for name, weight in module.state_dict().items()
    )


def _check_libraries() -> None:
    """Imports what is optional, and keeps its progress bars quiet: every process would show them."""
    try:
        import diffusers
        import transformers
    except ImportError as error:
        raise DeltaConvError(
            f"this needs diffusers ({error}): pip install '.[train]' in the folder of ComfyUI-DeltaConv"
        ) from error
    for library in (diffusers, transformers):
        quiet: Any = library.utils.logging
        quiet.disable_progress_bar()


def _from_folder(options: Options | Source, dtype: torch.dtype) -> Any:
    leave_out = _left_out(read_index(options.model))
    import diffusers

    classes: Any = diffusers
    variant = {"variant": options.variant} if options.variant else {}
    with loading(options.model):
        vae = classes.AutoencoderKL.from_pretrained(
            options.model, subfolder="vae", **ONLY_SAFETENSORS, **variant
        )
        return load_pipeline(options.model, dtype, options.variant, vae=vae, **leave_out)


def _from_file(options: Options | Source, dtype: torch.dtype) -> Any:
    if not os.path.isfile(options.model):
        raise DeltaConvError(
            f"expected model to be the folder of a diffusers pipeline or a .safetensors file; there is no "
            f"{options.model}"
        )
    single_file.check_ending(options.model)
    if options.model_config is not None:
        return _out_of_one_file(options, options.model_config, dtype, {})
    width = single_file.width_of(options.model)
    if width == 1024 and options.prediction is None:
        raise DeltaConvError(
            f"{options.model} is a Stable Diffusion 2.x model in one file, which does not say what it "
            "predicts; name it with --prediction: v_prediction for those of 768 pixels, epsilon for 512"
        )
    single_file.check_parts(options.model, width)
    tokenizers = single_file.tokenizers(width, options.tokenizer)
    details = single_file.details(options.model, width, options.prediction)
    with single_file.configuration(width, details) as folder:
        return _out_of_one_file(options, folder, dtype, tokenizers)


def _left_out(parts: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a pipeline by which it is loaded without what training does not need."""
    without: dict[str, Any] = {name: None for name in NOT_NEEDED if name in parts}
    return without | ({"requires_safety_checker": False} if "safety_checker" in parts else {})


def _out_of_one_file(
    options: Options | Source, folder: Path, dtype: torch.dtype, given: dict[str, Any]
) -> Any:
    import diffusers

    parts = read_index(folder)
    check_vocabularies(folder, parts, given)
    with loading(options.model, f" with {folder}"):
        kind: Any = getattr(diffusers, parts["_class_name"])
        leave_out = _left_out(parts)
        common = {"config": str(folder), "local_files_only": True}
        given = given | {
            name: encoder.to(dtype)
            for name, encoder in single_file.text_encoder(options.model, folder).items()
        }
        vae = diffusers.AutoencoderKL.from_single_file(str(options.model), subfolder="vae", **common)
        return kind.from_single_file(
            str(options.model), vae=vae, **dtype_argument(dtype), **given, **leave_out, **common
        )


def _noise(scheduler: Any, stated: str | None) -> tuple[Tensor, str]:
    """The cumulated alphas and what the network predicts."""
    import diffusers

    schedulers: Any = diffusers
    prediction = stated or scheduler.config.get("prediction_type")
    if prediction not in PREDICTIONS or "beta_schedule" not in scheduler.config:
        raise DeltaConvError(
            f"this teacher's scheduler ({type(scheduler).__name__}) has prediction_type {prediction!r}; "
            f"known are {' and '.join(PREDICTIONS)}, with a schedule of betas"
        )
    alphas: Tensor = schedulers.DDPMScheduler.from_config(scheduler.config).alphas_cumprod
    return alphas, PREDICTIONS[prediction]
