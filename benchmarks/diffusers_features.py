"""ΔConv in diffusers together with what pipelines do to their models, at full size, outputs compared.

    python -m benchmarks.diffusers_features [--architecture sd15 pixart_sigma ...] [--small] [--json FILE]

Builds each model on the CPU in float32 with random weights, puts random blocks in, and prints for each
feature the largest difference from what it must not change, as a part of the largest value:

- removed: after `remove`, from the model before `apply`; must be 0;
- offloaded: with its layers offloaded by accelerate, from the same model in place; must be 0;
- compiled: by torch.compile (--backend, inductor unless told), in one graph, from the uncompiled model;
- LoRA: active through peft, from the same LoRA merged into the weights by hand;
- ΔConv and LoRA themselves: how much they change, to show that the others mean something.

Exits with status 1 when a difference is above its limit.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
from safetensors.torch import save_file

from deltaconv_core import diffusers as adapter
from testing.comfy_architectures import ARCHITECTURES
from testing.compare import largest_error

from . import parity
from .diffusers_parity import FULL, LATENTS, both_inputs, diffusers_model, release_file, run

ADAPTED = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2")
RANK = 4


@dataclass(frozen=True)
class Row:
    """One feature of one model; `limit` None: no limit, only shown."""

    architecture: str
    feature: str
    difference: float
    limit: float | None

    def __str__(self) -> str:
        limit = "" if self.limit is None else f"(at most {self.limit:g})"
        return f"{self.architecture:14}{self.feature:12}{self.difference:10.1e}  {limit}".rstrip()

    @property
    def missed(self) -> bool:
        return self.limit is not None and not self.difference <= self.limit


def main() -> int:
    """Compares, and prints a line for each feature as soon as it is done."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--architecture", nargs="+", choices=ARCHITECTURES, default=FULL)
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default inductor)")
    parser.add_argument("--small", action="store_true", help="few channels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.architecture:
        for row in compare(name, arguments.small, arguments.backend):
            print(row, flush=True)
            rows.append(row)
    if arguments.json:
        figures = parity.circumstances(arguments.small) | {"backend": arguments.backend}
        arguments.json.write_text(
            json.dumps(figures | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        )
    misses = sum(row.missed for row in rows)
    print(f"{misses} of {len(rows)} above the limit")
    return int(misses > 0)


@torch.no_grad()
def compare(name: str, small: bool, backend: str) -> Iterator[Row]:
    """All features on one architecture."""
    from scripts import comfy_host

    comfy_host.import_comfy()
    torch.manual_seed(0)
    architecture = ARCHITECTURES[name]
    model = diffusers_model(name, architecture, small)
    _, inputs = both_inputs(model, architecture, small, LATENTS[name][small][0])
    plain = run(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.safetensors"
        save_file(release_file(model, architecture, small), file)
        adapter.apply(model, file)
        output = run(model, inputs)
        yield Row(name, "ΔConv", largest_error(output, plain), None)
        accelerate.cpu_offload(model, torch.device("cpu"))
        yield Row(name, "offloaded", largest_error(run(model, inputs), output), 0)
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
        compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
        yield Row(name, "compiled", largest_error(run(compiled, inputs), output), parity.LIMIT)
        del compiled
        torch._dynamo.reset()
        adapter.remove(model)
        yield Row(name, "removed", largest_error(run(model, inputs), plain), 0)
        add_lora(model)
        adapter.apply(model, file)
    styled = run(model, inputs)
    yield Row(name, "its LoRA", largest_error(styled, output), None)
    merge_lora(model)
    yield Row(name, "LoRA", largest_error(run(model, inputs), styled), parity.LIMIT)
    del model
    gc.collect()


def add_lora(model: Any) -> None:
    """A random one on both kinds of attention and on the layers after them."""
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(ADAPTED))
    peft.inject_adapter_in_model(config, model)
    for path, parameter in model.named_parameters():
        if "lora_" in path:
            parameter.copy_(torch.randn(parameter.shape) / parameter.shape[1] ** 0.5)


def merge_lora(model: Any) -> None:
    """Adds each product to its weight, and switches the LoRA off."""
    for module in model.modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
            module.base_layer.weight += up @ down
            module.enable_adapters(False)


if __name__ == "__main__":
    sys.exit(main())
