"""Whole networks in ComfyUI: attention in several ways, what others offer, ΔConv, and no self-attention.

    python -m benchmarks.network [--architecture sd15 ...] [--size 512 768 ...] [--json FILE]

Random weights and input, one forward pass of a real MODEL, alternating runs, medians:

- ComfyUI's attention: what it picks on this machine when it is told nothing;
- PyTorch attention: as with --use-pytorch-cross-attention; everything below uses it, too;
- HyperTile, ToMe: ComfyUI's own nodes, as they come; they act on U-Nets only;
- LinFusion: its linear attention in place of every self-attention;
- ΔConv: the authors' blocks in place of every self-attention, by way of ΔConv Patch Model;
- lean ΔConv: likewise the blocks of new distillations;
- hybrid: likewise hybrid mixers of the default form, 144 landmarks with Nyström's correction, which keep the
  attention's projections; everywhere, also where ΔConv Convert Model would leave attention alone;
- no self-attention: it costs nothing, and hands on what comes in. Nothing that replaces it can be faster.

Prints for each the time of a pass, that as a part of PyTorch attention's and in units of no self-attention's,
and the peak of memory above the loaded model. Every architecture and size runs in a process of its own. What
does not fit into memory, fails, or would take longer than --patience by what it took at a smaller size, is
left out, and says so. No turn starts after those before took longer than --patience together.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from typing import Any

import torch

from deltaconv_core import bench
from deltaconv_core.util.text import markdown
from scripts import comfy_host
from testing.comfy_architectures import ARCHITECTURES, build

from .harness import Results, add_machine, circumstances, parser, peak, reason

COMFYUI, PYTORCH, HYPERTILE, TOME = "ComfyUI's attention", "PyTorch attention", "HyperTile", "ToMe"
LINFUSION, DELTACONV, LEAN, NOTHING = "LinFusion", "ΔConv", "lean ΔConv", "no self-attention"
HYBRID = "hybrid"
VARIANTS = (COMFYUI, PYTORCH, HYPERTILE, TOME, LINFUSION, DELTACONV, LEAN, HYBRID, NOTHING)
QUADRATIC = (COMFYUI, PYTORCH, HYPERTILE, TOME)
SIZES = {"cpu": ("512", "768")}
SIZES_ELSEWHERE = ("512", "1024", "2048", "4096", "15360x8640")


@dataclass(frozen=True)
class Job:
    """What one process measures.

    Args:
        device, dtype: by their names.
        predicted: seconds of a pass by variant, where smaller sizes tell.
        patience: seconds; what would take longer is left out.
    """

    architecture: str
    size: tuple[int, int]
    batch: int
    device: str
    dtype: str
    small: bool
    repeats: int
    variants: tuple[str, ...]
    predicted: Mapping[str, float]
    patience: float


def main() -> int:
    command = parser(__doc__)
    command.add_argument("--architecture", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    command.add_argument("--size", nargs="+", help="of the picture, such as 768 or 1024x576")
    command.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    command.add_argument("--batch", type=int, default=1, help="samples in a pass (%(default)s)")
    command.add_argument("--patience", type=float, default=1800, help="in seconds (%(default)s)")
    add_machine(command, repeats=3)
    args = command.parse_args()
    device = bench.pick_device(args.device)
    dtype = bench.pick_dtype(args.dtype, device)
    results = Results(args.json, circumstances(device, dtype, args.small) | {"comfyui": comfyui_version()})
    for name in args.architecture:
        for size in map(bench.parse_size, args.size or default_sizes(name, device, args.small)):
            key = {"architecture": name, "size": size, "batch": args.batch}
            row = results.find(**key)
            if row is None:
                print(f"{name}, {size[0]} x {size[1]} ...", flush=True)
                job = Job(
                    **key,
                    device=str(device),
                    dtype=str(dtype).removeprefix("torch."),
                    small=args.small,
                    repeats=args.repeats,
                    variants=tuple(args.only),
                    predicted=predict(results.rows, key),
                    patience=args.patience,
                )
                row = results.add(key | apart(job))
            print(f"\n{table(row)}\n", flush=True)
    return 0


def default_sizes(name: str, device: torch.device, small: bool) -> tuple[str, ...]:
    if small:
        rows, columns = ARCHITECTURES[name].latents[0]
        return (f"{8 * columns}x{8 * rows}",)
    return SIZES.get(device.type, SIZES_ELSEWHERE)


def comfyui_version() -> str:
    """Of the ComfyUI that will be used, without loading it."""
    return comfy_host.version(comfy_host.find_host())


def predict(rows: list[dict[str, Any]], key: dict[str, Any]) -> dict[str, float]:
    """Seconds of a pass by variant, as far as smaller sizes tell."""
    pixels = key["size"][0] * key["size"][1]
    found: dict[str, float] = {}
    alike = [r for r in rows if r["architecture"] == key["architecture"] and r["batch"] == key["batch"]]
    for row in sorted(alike, key=lambda r: r["size"][0] * r["size"][1]):
        more = pixels / (row["size"][0] * row["size"][1])
        for name, known in row.get("variants", {}).items():
            if more > 1 and "seconds" in known:
                found[name] = known["seconds"] * more ** (2 if name in QUADRATIC else 1)
    return found


def apart(job: Job) -> dict[str, Any]:
    """What `measure` gives in a process of its own, or why there is nothing."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(measure, job).result()
        except BrokenProcessPool:
            return {"skipped": "the process was ended from outside, probably for want of memory"}


def measure(job: Job) -> dict[str, Any]:
    """The figures of one architecture at one size."""
    device = torch.device(job.device)
    comfy_host.ARGUMENTS |= {"cpu": device.type == "cpu", "use_pytorch_cross_attention": False}
    pack = comfy_host.import_pack().__name__
    torch.manual_seed(0)
    with torch.inference_mode():
        host = Host(pack, job)
        figures: dict[str, dict[str, Any]] = {}
        for name in job.variants:
            figures[name] = host.first(name, device)
            print(f"  {name}: {figures[name].get('skipped') or 'runs'}", flush=True)
        times: dict[str, list[float]] = {n: [] for n in job.variants if "skipped" not in figures[n]}
        for turn in range(job.repeats):
            if sum(map(sum, times.values())) > job.patience:
                break
            for name in list(times):
                try:
                    times[name].append(host.one_pass(name))
                except RuntimeError as error:
                    figures[name]["skipped"] = reason(error)
                    del times[name]
            print(f"  turn {turn + 1} of {job.repeats}", flush=True)
    for name, seconds in times.items():
        figures[name] |= {"seconds": statistics.median(seconds), "times": seconds}
    return {"picked": host.picked.__name__, "variants": figures}


class Host:
    """One model in ComfyUI, and its variants; each is made when it first runs."""

    def __init__(self, pack: str, job: Job) -> None:
        self.pack, self.job = pack, job
        self.attention = import_module("comfy.ldm.modules.attention")
        self.picked = self.attention.optimized_attention
        self.passes = self.module("nodes.host.bench.passes")
        self.model = build(ARCHITECTURES[job.architecture], job.small, bench.DTYPES[job.dtype])
        self.found = self.module("nodes.host.model.sites").find_sites(self.model)
        self.given = self.passes.random_input(self.model, job.batch, bench.latent_of(job.size))
        self.made: dict[str, Any] = {}

    def module(self, name: str) -> Any:
        return import_module(f".{name}", self.pack)

    def first(self, name: str, device: torch.device) -> dict[str, Any]:
        """The first pass of a variant: its memory, or why it does not run."""
        management = import_module("comfy.model_management")
        unet = type(self.model.get_model_object("diffusion_model")).__name__ == "UNetModel"
        if name == COMFYUI and self.picked is self.attention.attention_pytorch:
            return {"skipped": "is PyTorch attention here"}
        if name in (HYPERTILE, TOME) and not unet:
            return {"skipped": "acts on U-Nets only"}
        if (seconds := self.job.predicted.get(name, 0)) > self.job.patience:
            return {"skipped": f"would take up to {seconds:,.0f} s"}
        try:
            self.made[name] = self.make(name)
            management.load_models_gpu([self.made[name]])
            return {"memory": peak(lambda: self.one_pass(name), device)}
        except RuntimeError as error:
            self.made.pop(name, None)
            management.soft_empty_cache()
            return {"skipped": reason(error)}

    def one_pass(self, name: str) -> float:
        """Seconds of a pass."""
        chosen = self.picked if name == COMFYUI else self.attention.attention_pytorch
        with attention_is(chosen):
            return float(self.passes.one_pass(self.made[name], self.given).seconds)

    def make(self, name: str) -> Any:
        """The MODEL of a variant."""
        makers: dict[str, Callable[[], Any]] = {
            HYPERTILE: lambda: from_node("nodes_hypertile", "HyperTile", self.model, 256, 2, 0, False),
            TOME: lambda: from_node("nodes_tomesd", "TomePatchModel", self.model, 0.3),
            LINFUSION: self.linear,
            DELTACONV: lambda: self.deltaconv("released"),
            LEAN: lambda: self.deltaconv("lean"),
            HYBRID: self.hybrid,
            NOTHING: lambda: self.passes.without_attention(self.model, self.found.sites.values()),
        }
        return makers[name]() if name in makers else self.model.clone()

    def deltaconv(self, form: str) -> Any:
        """Blocks with random weights, put on as ΔConv Patch Model puts them."""
        core = self.module("deltaconv_core")
        choose = self.module("deltaconv_core.sites.choose_specs")
        specs = choose.block_specs(self.found.shape, self.found.sites, choose.AUTO, form)
        with torch.inference_mode(False):
            return self.patched({id: core.DeltaConvBlock(spec) for id, spec in specs.items()})

    def hybrid(self) -> Any:
        """Hybrid mixers of the default form, likewise."""
        mixers, attend = self.module("deltaconv_core.mixers.hybrid"), self.module("nodes.host.model.attend")
        blocks = {}
        for id, site in self.found.sites.items():
            heads = attend.heads_of(self.model, site)
            with torch.inference_mode(False):
                spec = mixers.HybridSpec(site.channels, heads, site.channels // heads)
                blocks[id] = mixers.HybridMixer(spec)
        return self.patched(blocks)

    def patched(self, blocks: dict[str, Any]) -> Any:
        """Put on as ΔConv Patch Model does."""
        core, host = self.module("deltaconv_core"), self.module("nodes.host.patch.apply")
        whole = self.module("deltaconv_core.sites.sampling_range").SamplingRange()
        checkpoint = core.Checkpoint(self.found.architecture, blocks)
        settings = host.PatchSettings("all", whole, None)
        return host.apply_checkpoint(self.model, self.found, checkpoint, settings)[0]

    def linear(self) -> Any:
        """LinFusion's mixers at every site."""
        clone = self.model.clone()
        base, utils = clone.model, import_module("comfy.utils")
        for site in self.found.sites.values():
            attention = utils.get_attr(base, site.path)
            heads = getattr(attention, "heads", None) or attention.num_heads
            linear = self.module("deltaconv_core.mixers.linear_attention")
            mixer = linear.LinearAttention(site.channels, heads)
            mixer.to(clone.load_device, bench.DTYPES[self.job.dtype])
            clone.add_object_patch(f"{site.path}.forward", standing(mixer, site))
        return clone


def standing(mixer: torch.nn.Module, site: Any) -> Callable[..., torch.Tensor]:
    """A mixer as the forward of an attention."""
    return lambda x, *_, **call: mixer(x, grid=site.grid_of(x, call))


def from_node(module: str, node: str, model: Any, *settings: Any) -> Any:
    """The MODEL out of one of ComfyUI's nodes, whichever of its two interfaces it has."""
    found = getattr(import_module(f"comfy_extras.{module}"), node)
    return (
        found.execute(model, *settings)[0]
        if hasattr(found, "execute")
        else found().patch(model, *settings)[0]
    )


@contextmanager
def attention_is(function: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Has ComfyUI compute all its attention with this function."""
    places = [import_module(f"comfy.ldm.{name}") for name in ("modules.attention", "pixart.blocks")]
    names = ("optimized_attention", "optimized_attention_masked")
    before = [(p, name, getattr(p, name)) for p in places for name in names if hasattr(p, name)]
    try:
        for place, name, _ in before:
            setattr(place, name, function)
        yield
    finally:
        for place, name, own in before:
            setattr(place, name, own)


def table(row: dict[str, Any]) -> str:
    """A line for each variant."""
    width, height = row["size"]
    head = f"{row['architecture']}, {width} x {height}, batch {row['batch']}"
    if "skipped" in row:
        return f"{head}: {row['skipped']}"
    variants = row["variants"]
    of = {name: variants.get(name, {}).get("seconds") for name in (PYTORCH, NOTHING)}
    lines = []
    for name, known in variants.items():
        seconds, memory = known.get("seconds"), known.get("memory")
        line = {"variant": name, "s": f"{seconds:.3f}" if seconds else "–"}
        for other, own in of.items():
            line[f"of {other}"] = f"{seconds / own:.3f}" if seconds and own else ""
        lines.append(line | {"GiB": "" if memory is None else f"{memory / 2**30:.2f}"})
    skipped = [f"{name}: {known['skipped']}" for name, known in variants.items() if "skipped" in known]
    return "\n".join([f"{head}; ComfyUI picks {row['picked']}", "", *markdown(lines), "", *skipped])


if __name__ == "__main__":
    sys.exit(main())
