"""How much memory looking at self-attention takes, on the CPU: a full-size model in ComfyUI.

    python -m benchmarks.locality_memory [--architecture sd15] [--latent 128] [--blocks PATTERN] [--small]

Random float32 weights. Samples one step and looks at the chosen self-attentions (by default one at full
resolution: at a latent side of 128, 16,384 tokens, 8 heads, 320 channels), exactly, as the node ΔConv
Attention Locality does. Prints the peak of the process's memory above what it had with the model loaded, the
same for a step without looking, and the seconds of both. Exits with status 1 when the first is 4 GiB or more.
Memory is read from /proc, so on Linux.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from testing.comfy_architectures import ARCHITECTURES, build, make_inputs

from .harness import highest, resident

LIMIT = 4 * 2**30
GIB = 2**30


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architecture", choices=list(ARCHITECTURES), default="sd15", help="default sd15")
    parser.add_argument("--latent", type=int, default=128, help="side of the latent (default 128)")
    parser.add_argument("--blocks", default="down_blocks.0.attentions.0", help="default %(default)s")
    parser.add_argument("--small", action="store_true", help="the same classes with few channels")
    args = parser.parse_args()
    from scripts.comfy_host import import_pack

    pack = import_pack().__name__
    torch.manual_seed(0)
    architecture = ARCHITECTURES[args.architecture]
    model = build(architecture, args.small)
    context = make_inputs(architecture, args.small, (args.latent, args.latent))["context"][:1]
    positive = [[context, {"pooled_output": torch.zeros(1, 1280)}]]
    latent = torch.zeros(1, 4, args.latent, args.latent)
    host = import_module(".nodes.host.locality.look", pack)
    settings = host.LookSettings(steps=1, looks=1, blocks=args.blocks, seed=0)
    seen: list[Any] = []
    gc.collect()
    before = resident()
    with torch.inference_mode():
        looking = measure(
            lambda: seen.append(host.look(model, positive, {"samples": latent}, settings)), before
        )
        plain = measure(lambda: sample(model, positive, latent), before)
    for layer in seen[0].layers:
        height, width = layer.grid
        how = "exact" if layer.exact else f"{layer.queries} queries"
        print(
            f"{layer.site}: {height} x {width} tokens, {layer.heads} heads, {layer.channels} channels, {how}"
        )
    for name, (peak, seconds) in (("one step", plain), ("one step, looking", looking)):
        print(f"{name}: {peak / GIB:.2f} GiB above the model, {seconds:.0f} s")
    return int(looking[0] >= LIMIT)


def sample(model: Any, positive: Any, latent: torch.Tensor) -> None:
    """The same step without looking."""
    import comfy.sample

    noise = comfy.sample.prepare_noise(latent, 0)
    comfy.sample.sample(
        model, noise, 1, 1.0, "euler", "simple", positive, positive, latent, disable_pbar=True, seed=0
    )


def measure(run: Callable[[], Any], before: int) -> tuple[int, float]:
    """The most bytes that the process holds meanwhile, above those before; and seconds."""
    start = time.perf_counter()
    return highest(run) - before, time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
