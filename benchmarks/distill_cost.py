"""What distilling costs: time and memory of both phases on a full-size model in ComfyUI, on the CPU.

    python -m benchmarks.distill_cost [--architecture sd15] [--latent 64] [--repeats 3] [--small] [--json F]

Random float32 weights, one latent of the given side. Each of these runs in a process of its own, by turns
with the teacher's forward pass:

- layer-wise: a step of the first phase, optimizer included;
- end to end: a step of the second phase, one network in two modes, with gradient checkpointing;
- two models: the same step as the authors' code does it, with a second copy of the model as the teacher and
  no checkpointing.

Prints for each its time in units of a teacher forward pass (medians), the peak of the process's memory above
what it had before the model was built, and that as a multiple of what cannot be avoided: the peak of a
teacher forward pass, the blocks, and the optimizer's state. Memory is read from /proc, so on Linux.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from testing.comfy_architectures import ARCHITECTURES, build

from .harness import circumstances, highest, resident

WAYS = ("layer-wise", "end to end", "two models")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architecture", choices=list(ARCHITECTURES), default="sd15", help="default sd15")
    parser.add_argument("--latent", type=int, default=64, help="side of the latent (default 64)")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each kind (default 3)")
    parser.add_argument("--small", action="store_true", help="the same classes with few channels")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    machine: dict[str, Any] = {}
    print(f"{'':12}{'time':>8}{'memory':>10}{'of the least':>14}{'seconds':>10}")
    for way in WAYS:
        with get_context("spawn").Pool(1) as pool:
            row, machine = pool.apply(
                measure, (way, args.architecture, args.latent, args.repeats, args.small)
            )
        rows.append(row)
        print(
            f"{way:12}{row['time']:>7.2f}x{row['memory'] / 2**30:>6.2f} GiB{row['of_the_least']:>13.2f}x"
            f"{row['seconds']:>10.1f}",
            flush=True,
        )
    if args.json:
        described = {**machine, "latent": args.latent, "architecture": args.architecture, "rows": rows}
        args.json.write_text(json.dumps(described, indent=1) + "\n")
    return 0


def measure(
    way: str, architecture: str, latent: int, repeats: int, small: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures of one way, and where they were taken."""
    from scripts import comfy_host

    pack = comfy_host.import_pack().__name__
    before = resident()
    torch.manual_seed(0)
    with ExitStack() as stack:
        network, mixers, batch, forward = prepare(pack, architecture, latent, small, stack)
        forward()
        least = highest(forward) - before
        sizes = [p.numel() * p.element_size() for mixer in mixers.values() for p in mixer.parameters()]
        least += 2 * sum(sizes)  # AdamW's moments; the blocks are there already
        step = make_step(pack, way, network, mixers, batch, stack)
        step()
        peak = highest(step) - before
        times: dict[Callable[[], Any], list[float]] = {forward: [], step: []}
        for _ in range(repeats):
            for run, seconds in times.items():
                start = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - start)
    one, other = (statistics.median(seconds) for seconds in times.values())
    row = {
        "way": way,
        "time": other / one,
        "memory": peak,
        "least": least,
        "of_the_least": peak / least,
        "seconds": other,
        "forward_seconds": one,
    }
    return row, circumstances(small=small)


def prepare(pack: str, architecture: str, latent: int, small: bool, stack: ExitStack) -> Any:
    """The network as ComfyUI's nodes distil it, mixers, a batch, and the teacher's forward pass."""
    core = import_module(".deltaconv_core.distill", pack)
    host = f"{pack}.nodes.host"
    shape = ARCHITECTURES[architecture]
    model = build(shape, small)
    found = import_module(f"{host}.model.sites").find_sites(model)
    clone = stack.enter_context(import_module(f"{host}.model.borrow").borrowed_model(model, torch.float32, 0))
    network = import_module(f"{host}.distill.network").ComfyNetwork(clone, found.sites)
    choose = import_module(".deltaconv_core.sites.choose_specs", pack)
    specs = choose.block_specs(found.shape, found.sites, choose.AUTO)
    block = import_module(".deltaconv_core", pack).DeltaConvBlock
    mixers = {id: block(spec) for id, spec in specs.items()}
    for id, mixer in mixers.items():
        core.warm_start(mixer, network.attentions[id])
    config = shape.sized(small)
    context = torch.randn(1, 77, config.get("context_dim") or config["caption_channels"])
    conditions = {"c_crossattn": context}
    if config.get("adm_in_channels"):
        conditions["y"] = torch.randn(1, config["adm_in_channels"])
    clean, noise = torch.randn(2, 1, 4, latent, latent)
    batch = network.batch(clean, noise, network.sigmas[500:501], conditions)

    def forward() -> None:
        with torch.no_grad():
            network(batch)

    return network, mixers, batch, forward


def make_step(
    pack: str, way: str, network: Any, mixers: Any, batch: Any, stack: ExitStack
) -> Callable[[], None]:
    """One optimizer step of a way."""
    core = import_module(".deltaconv_core.distill", pack)
    optimizer = torch.optim.AdamW([p for mixer in mixers.values() for p in mixer.parameters()], lr=1e-5)
    taps = stack.enter_context(core.tapped(network.attentions, mixers, network.grids))
    if way == "layer-wise":
        task = core.LayerWise(network, taps)
    else:
        if way == "two models":
            network, taps = with_second_model(pack, network, mixers, taps, stack)
        task = core.EndToEnd(network, taps, core.Settings(checkpointing=way == "end to end"))

    def step() -> None:
        task(batch, lambda loss: loss.backward())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def with_second_model(pack: str, student: Any, mixers: Any, taps: Any, stack: ExitStack) -> Any:
    """A network that asks a copy of the model where the teacher is asked, and taps on both."""
    core = import_module(".deltaconv_core.distill", pack)
    teacher = copy.copy(student)
    teacher.base = copy.deepcopy(student.base)
    for module in teacher.base.modules():
        module.__dict__.pop("forward", None)
    names = {module: name for name, module in student.base.named_modules()}
    teacher.attentions = {
        id: teacher.base.get_submodule(names[module]) for id, module in student.attentions.items()
    }
    of_teacher = stack.enter_context(core.tapped(teacher.attentions, mixers, student.grids))

    class Both:
        taps = of_teacher.taps

        @staticmethod
        @contextmanager
        def mode(mixing: bool, observe: Any = None) -> Iterator[None]:
            with taps.mode(mixing=mixing, observe=observe), of_teacher.mode(mixing=False, observe=observe):
                yield

    class Two:
        prediction = student.prediction

        def __call__(self, batch: Any) -> Any:
            mixing = next(iter(taps.taps.values())).mixing
            return (student if mixing else teacher)(batch)

    return Two(), Both


if __name__ == "__main__":
    sys.exit(main())
