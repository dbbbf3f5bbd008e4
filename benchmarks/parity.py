"""Published files through ΔConv Patch Model, beside the authors' block put into the network by hand.

    python -m benchmarks.parity [--architecture sd15|sdxl|pixart_sigma|all] [--small] [--json FILE]

Builds each model in ComfyUI on the CPU in float32 with random weights, writes a file in every form of the
authors', loads it through the node, and runs the patched network. What it gives is compared with the same
network in which `authors_block.py` stands at every self-attention (and the file's ResNet convolutions in
their place). Prints for each form and latent size

- error: the largest difference, as a part of the largest value of the expected output;
- without: likewise, for the network whose blocks give zero; so much of the output hangs on the blocks;

and exits with status 1 when an error is above 1e-4. The largest model, sdxl, has 2.6 billion parameters: 10
GB in float32, beside which the 1.5 GB of its file are held a few times over. --small takes the same classes
with few channels.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from testing import authors_block
from testing.authors_block import Form, Weights, published, random_weights, scaled_noise
from testing.comfy_architectures import (
    ARCHITECTURES,
    Place,
    attentions,
    build,
    by_hand,
    convolutions,
    make_inputs,
)
from testing.compare import largest_error

from .harness import circumstances

LIMIT = 1e-4


@dataclass(frozen=True)
class Row:
    """One comparison; `error` and `without` as said above, `seconds` for the three runs of the network."""

    architecture: str
    form: str
    latent: tuple[int, int]
    error: float
    without: float
    seconds: float

    def __str__(self) -> str:
        size = "{} x {}".format(*self.latent)
        return (
            f"{self.architecture:14}{self.form:15}{size:>8}{self.error:12.1e}{self.without:12.2f}"
            f"{self.seconds:10.1f}"
        )


def main() -> int:
    """Compares, and prints a line for each comparison as soon as it is done."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--architecture", choices=[*ARCHITECTURES, "all"], default="all")
    parser.add_argument("--small", action="store_true", help="few channels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    names = list(ARCHITECTURES) if arguments.architecture == "all" else [arguments.architecture]
    print(f"{'architecture':14}{'form':15}{'latent':>8}{'error':>12}{'without':>12}{'seconds':>10}")
    rows = []
    for name in names:
        for row in compare(name, arguments.small):
            print(row, flush=True)
            rows.append(row)
    if arguments.json:
        figures = circumstances(small=arguments.small) | {"limit": LIMIT}
        figures |= {"rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    misses = sum(not row.error <= LIMIT for row in rows)
    print(f"{misses} of {len(rows)} comparisons above {LIMIT:g}")
    return int(misses > 0)


def compare(name: str, small: bool) -> Iterator[Row]:
    """All forms of one architecture at all its latent sizes."""
    from scripts import comfy_host

    comfy_host.import_comfy()
    torch.manual_seed(0)
    architecture = ARCHITECTURES[name]
    with torch.no_grad():
        model = build(architecture, small)
        places = attentions(architecture, small)
        inputs = {latent: make_inputs(architecture, small, latent) for latent in architecture.latents}
        for form in architecture.forms:
            yield from _compare_form(name, small, model, places, inputs, form)


def _compare_form(
    name: str,
    small: bool,
    model: Any,
    places: dict[str, Place],
    inputs: dict[tuple[int, int], dict[str, Tensor]],
    form: Form,
) -> Iterator[Row]:
    network = model.model.diffusion_model
    blocks = {id: random_weights(place.channels, place.kernel_size, form) for id, place in places.items()}
    names = convolutions(ARCHITECTURES[name], small)
    base = {id: scaled_noise(network.get_parameter(path).shape) for id, path in names.items()}
    patched = patch_with_file(model, f"{name} {form.name}.safetensors", published(blocks, base, form))
    actual = {latent: timed(run_loaded, patched, given) for latent, given in inputs.items()}
    unload()
    others = {names[id]: weight for id, weight in base.items()}
    for latent, given in inputs.items():
        standing = {
            place.path: partial(stand_in, weights=blocks[id], grid=place.grid(latent), form=form)
            for id, place in places.items()
        }
        with by_hand(network, standing, others):
            expected, seconds = timed(run, network, given)
        with by_hand(network, dict.fromkeys(standing, nothing), others):
            without, more_seconds = timed(run, network, given)
        output, first_seconds = actual[latent]
        yield Row(
            name,
            form.name,
            latent,
            error=largest_error(output, expected),
            without=largest_error(without, expected),
            seconds=first_seconds + seconds + more_seconds,
        )


def stand_in(x: Tensor, *_: Any, weights: Weights, grid: tuple[int, int], form: Form, **__: Any) -> Tensor:
    """The authors' block as the forward of an attention: (B, H * W, C) -> (B, H * W, C)."""
    return authors_block.block(weights, x.unflatten(1, grid), form).flatten(1, 2)


def nothing(x: Tensor, *_: Any, **__: Any) -> Tensor:
    """A block that gives zero."""
    return torch.zeros_like(x)


def patch_with_file(model: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The MODEL out of ΔConv Patch Model, which was told to read these tensors from a file."""
    from scripts import comfy_host

    node = import_module(".nodes.patch_model", comfy_host.import_pack().__name__).PatchModel
    folder = Path(import_module("folder_paths").get_folder_paths("deltaconv")[0])
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name)
    try:
        with torch.inference_mode():
            return node.execute(model, name, "all", 0.0, 1.0, "apply", 1.0).args[0]
    finally:
        (folder / name).unlink()


def run_loaded(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Output of a MODEL's network after ComfyUI has loaded it, and with what the MODEL carries for it."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    return run(model.model.diffusion_model, inputs, model.model_options["transformer_options"])


def unload() -> None:
    """Has ComfyUI take its patches off the networks."""
    import comfy.model_management

    comfy.model_management.unload_all_models()


def run(network: torch.nn.Module, inputs: dict[str, Tensor], options: dict[str, Any] | None = None) -> Tensor:
    """The network's output."""
    with torch.inference_mode():
        return network(**inputs, transformer_options=dict(options or {}))


def timed(function: Any, *arguments: Any) -> tuple[Any, float]:
    """The function's answer, and the seconds that it took."""
    start = time.perf_counter()
    return function(*arguments), time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
