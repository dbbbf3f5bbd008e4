"""One file, one network: published weights on the same model in ComfyUI and in diffusers, outputs compared.

    python -m benchmarks.diffusers_parity [--architecture sd15 pixart_sigma ...] [--small] [--json FILE]

Builds each model in diffusers on the CPU in float32 with random weights, and hands the very same weights to
ComfyUI, whose own loader converts them (--small: few channels, put in by ComfyUI's map of names). A file in
the authors' form goes through ΔConv Patch Model on one side and through `deltaconv_core.diffusers.apply` on
the other. Prints for each latent size and state of the model

- error: the largest difference between both outputs, as a part of the largest value;
- change: likewise, between this state and attention in the same host; so much of the output hangs on ΔConv;

for the states "attention" (before), "ΔConv", and "removed" (after), and exits with status 1 when an error is
above 1e-4, or when a removed ΔConv left a trace. SD1.5 needs about 12 GB at its largest, most of it for two
models and the convolutions that the file puts into them; sdxl has three times as many weights and is compared
when asked for.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from deltaconv_core import diffusers as adapter
from testing.authors_block import published, random_weights, scaled_noise
from testing.comfy_architectures import (
    ARCHITECTURES,
    Architecture,
    attentions,
    build,
    convolutions,
    make_inputs,
)
from testing.compare import largest_error

from . import parity
from .harness import circumstances

FULL = ("sd15", "pixart_sigma")
TEXT = 12  # of the small sdxl's pooled text embedding
TIME_IDS = (512.0, 384.0, 0.0, 0.0, 512.0, 384.0)
# (rows, columns), full and small. PixArt takes even latents only; from 34 x 34 to 94 x 94 both hosts count
# positions alike.
LATENTS = {
    "sd15": (((64, 64), (33, 47)), ((32, 32), (33, 27))),
    "sdxl": (((64, 64), (33, 47)), ((32, 32), (33, 27))),
    "pixart_sigma": (((64, 64), (48, 72)), ((48, 40), (46, 38))),
}


@dataclass(frozen=True)
class Row:
    """One comparison; `error` and `change` as said above."""

    architecture: str
    latent: tuple[int, int]
    state: str
    error: float
    change: float

    def __str__(self) -> str:
        size = "{} x {}".format(*self.latent)
        return f"{self.architecture:14}{size:>8}  {self.state:12}{self.error:12.1e}{self.change:12.2f}"

    @property
    def missed(self) -> bool:
        return not self.error <= parity.LIMIT or (self.state == "removed" and self.change > 0)


def main() -> int:
    """Compares, and prints a line for each comparison as soon as it is done."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--architecture", nargs="+", choices=ARCHITECTURES, default=FULL)
    parser.add_argument("--small", action="store_true", help="few channels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    print(f"{'architecture':14}{'latent':>8}  {'state':12}{'error':>12}{'change':>12}")
    rows = []
    for name in arguments.architecture:
        for row in compare(name, arguments.small):
            print(row, flush=True)
            rows.append(row)
    if arguments.json:
        import diffusers

        figures = circumstances(small=arguments.small) | {"limit": parity.LIMIT}
        figures |= {"diffusers": diffusers.__version__}
        arguments.json.write_text(
            json.dumps(figures | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        )
    misses = sum(row.missed for row in rows)
    print(f"{misses} of {len(rows)} comparisons above {parity.LIMIT:g}")
    return int(misses > 0)


@torch.no_grad()
def compare(name: str, small: bool) -> Iterator[Row]:
    """One architecture at all its latent sizes, in all three states."""
    from scripts import comfy_host

    comfy_host.import_comfy()

    torch.manual_seed(0)
    architecture = ARCHITECTURES[name]
    theirs = diffusers_model(name, architecture, small)
    host = comfyui_model(theirs, architecture, small)
    inputs = {latent: both_inputs(theirs, architecture, small, latent) for latent in LATENTS[name][small]}
    tensors = release_file(theirs, architecture, small)
    before = Outputs(host, theirs, inputs)
    yield from before.rows(name, "attention", before)
    patched = parity.patch_with_file(host, f"{name}.safetensors", tensors)
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "weights.safetensors")
        del tensors
        adapter.apply(theirs, Path(folder) / "weights.safetensors")
    yield from Outputs(patched, theirs, inputs).rows(name, "ΔConv", before)
    parity.unload()
    adapter.remove(theirs)
    yield from Outputs(host, theirs, inputs).rows(name, "removed", before)


class Outputs:
    """Of both hosts, for every latent size.

    Args:
        host: ComfyUI's MODEL.
        theirs: diffusers' model.
        inputs: latent size -> arguments for the one and for the other.
    """

    def __init__(self, host: Any, theirs: torch.nn.Module, inputs: dict[tuple[int, int], Any]) -> None:
        self.host = {latent: parity.run_loaded(host, given) for latent, (given, _) in inputs.items()}
        self.theirs = {latent: run(theirs, given) for latent, (_, given) in inputs.items()}

    def rows(self, name: str, state: str, before: Outputs) -> Iterator[Row]:
        for latent, output in self.theirs.items():
            error = largest_error(output, self.host[latent])
            change = max(
                largest_error(output, before.theirs[latent]),
                largest_error(self.host[latent], before.host[latent]),
            )
            yield Row(name, latent, state, error, change)


def run(model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The predicted noise; PixArt gives a variance beside it."""
    with torch.inference_mode():
        return model(**inputs).sample[:, :4]


def diffusers_model(name: str, architecture: Architecture, small: bool) -> torch.nn.Module:
    """With random weights such that activations neither explode nor vanish."""
    import comfy.supported_models
    import diffusers

    config = architecture.sized(small)
    if name == "pixart_sigma":
        model = diffusers.PixArtTransformer2DModel(
            num_attention_heads=config["num_heads"],
            attention_head_dim=config["hidden_size"] // config["num_heads"],
            cross_attention_dim=config["hidden_size"],
            num_layers=config["depth"],
            caption_channels=config["caption_channels"],
            sample_size=config["input_size"],
            use_additional_conditions=False,
        )
    else:
        # ComfyUI goes by its own number of heads, whatever the config says.
        config |= getattr(comfy.supported_models, architecture.host_class).unet_extra_config
        model = diffusers.UNet2DConditionModel(**unet_config(name, config))
    for path, parameter in model.requires_grad_(False).eval().named_parameters():
        if parameter.ndim == 1:
            value = 0.1 * torch.randn(parameter.shape) + float(path.endswith("weight"))  # norms scale by 1
        else:
            value = scaled_noise(parameter.shape)
        parameter.copy_(value)
    return model


def unet_config(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """ComfyUI's description of a U-Net in diffusers' words."""
    levels = tuple(config["model_channels"] * factor for factor in config["channel_mult"])
    depths = config["transformer_depth"][::2]
    cross = [depth > 0 for depth in depths]
    own = {
        "block_out_channels": levels,
        "down_block_types": tuple("CrossAttnDownBlock2D" if c else "DownBlock2D" for c in cross),
        "up_block_types": tuple("CrossAttnUpBlock2D" if c else "UpBlock2D" for c in cross[::-1]),
        "transformer_layers_per_block": tuple(max(depth, 1) for depth in depths),
        "cross_attention_dim": config["context_dim"],
        "use_linear_projection": config["use_linear_in_transformer"],
        # What diffusers calls the dimension of a head is the number of heads.
        "attention_head_dim": config["num_heads"],
    }
    if (size := config["num_head_channels"]) > 0:
        own["attention_head_dim"] = tuple(max(1, channels // size) for channels in levels)
    if name == "sdxl":
        text = 1280 if config["adm_in_channels"] == 2816 else TEXT
        own |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (config["adm_in_channels"] - text) // len(TIME_IDS),
            "projection_class_embeddings_input_dim": config["adm_in_channels"],
        }
    return own


def comfyui_model(theirs: torch.nn.Module, architecture: Architecture, small: bool) -> Any:
    """A ModelPatcher with the weights of diffusers' model, converted by ComfyUI."""
    import comfy.sd

    weights = theirs.state_dict()
    if not small:
        return comfy.sd.load_diffusion_model_state_dict(dict(weights), {"dtype": torch.float32})
    model = build(architecture, small)
    network = model.model.diffusion_model
    own = {name: torch.full_like(value, torch.nan) for name, value in network.state_dict().items()}
    for name, (target, part) in conversion(architecture, small).items():
        if name in weights:
            place = own[target] if part is None else own[target].narrow(*part)
            place.copy_(weights.pop(name).reshape(place.shape))
    # ComfyUI computes positions, and has an embedding of no text for training.
    left = weights.keys() - {"pos_embed.pos_embed"}
    unset = {name for name, value in own.items() if value.isnan().any()} - {"y_embedder.y_embedding"}
    if left or unset:
        raise RuntimeError(f"ComfyUI has no place for {left}, and got nothing for {unset}")
    network.load_state_dict({name: value.nan_to_num() for name, value in own.items()})
    return model


def conversion(architecture: Architecture, small: bool) -> dict[str, tuple[str, Any]]:
    """Diffusers name -> ComfyUI's name and the part of the tensor that it is, None being the whole."""
    import comfy.utils

    config = architecture.sized(small)
    if "depth" in config:
        table = comfy.utils.pixart_to_diffusers(config)
    else:
        table = comfy.utils.unet_to_diffusers(config)
    return {name: (t, None) if isinstance(t, str) else (t[0], t[1]) for name, t in table.items()}


def both_inputs(
    theirs: torch.nn.Module, architecture: Architecture, small: bool, latent: tuple[int, int]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same input as arguments for ComfyUI's network and for diffusers' model."""
    host = make_inputs(architecture, small, latent)
    other = {"timestep": host["timesteps"], "encoder_hidden_states": host["context"]}
    if "y" in host:
        ids = torch.tensor(TIME_IDS).expand(len(host["x"]), -1)
        times = theirs.add_time_proj(ids.flatten()).unflatten(0, ids.shape).flatten(1)
        text = host["y"][:, : host["y"].shape[1] - times.shape[1]]
        host["y"] = torch.cat([text, times], dim=1)
        other["added_cond_kwargs"] = {"text_embeds": text, "time_ids": ids}
    if "depth" in architecture.config:
        other["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
        return host, other | {"hidden_states": host["x"]}
    return host, other | {"sample": host["x"]}


def release_file(theirs: torch.nn.Module, architecture: Architecture, small: bool) -> dict[str, Tensor]:
    """Random weights in the authors' form: a block for every site, and the convolutions of the model."""
    form = architecture.forms[0]
    blocks = {
        id: random_weights(place.channels, place.kernel_size, form)
        for id, place in attentions(architecture, small).items()
    }
    names = convolutions(architecture, small)
    base = {name: scaled_noise(theirs.get_parameter(name).shape) for name in names}
    return published(blocks, base, form)


if __name__ == "__main__":
    sys.exit(main())
