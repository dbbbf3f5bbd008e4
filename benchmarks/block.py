"""One layer: self-attention by every way that PyTorch has, LinFusion, ΔConv, and neighborhood attention.

    python -m benchmarks.block [--preset sd15-512 ...] [--backward] [--json FILE]

Whole layers with their projections, random weights and tokens, alternating runs, medians. Prints for each
method its time, that in units of ΔConv's fastest backend's, the peak of memory above what was there before,
floating point operations as PyTorch's counter counts them (attention in its plain form; backward as twice
forward), and

- of bandwidth: the bytes that any method must move (tokens in, tokens out, weights) per second, as a part of
  what a large copy reaches on this device;
- of products: operations per second, as a part of what a large matrix product reaches in this dtype.

What would take longer than --patience at that rate, or more memory than there is, or fails, is left out, and
says so.
ΔConv is the authors' block by each backend, lean ΔConv that of new distillations by the backend chosen here.
Presets hold the self-attention layers of a model at a size of picture, each distinct one once; "paper" is the
layer of the paper's table 1, "kernel" those that a GPU's kernels are judged by.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from deltaconv_core import BlockSpec, DeltaConvBlock, DeltaConvError, bench
from deltaconv_core.bench import Layer
from deltaconv_core.block.ops import choose
from deltaconv_core.mixers.linear_attention import LinearAttention
from deltaconv_core.mixers.neighborhood import neighborhood_attention
from deltaconv_core.util.text import markdown

from .harness import Results, add_machine, available, circumstances, parser, peak, reason

KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
MODELS = {"sd15": (512, 768, 1024), "sdxl": (512, 1024), "pixart_sigma": (512, 1024)}
PAPER = ((64, 64), (128, 128), (270, 512), (1080, 1920))  # 512, 1024, 4096 x 2160, 15360 x 8640 pixels


@dataclass(frozen=True)
class Method:
    """A way to mix the tokens of a layer.

    Args:
        make: module for (layer, device, dtype).
        context: in which it runs.
    """

    make: Callable[[Layer, torch.device, torch.dtype], nn.Module]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


class Neighborhood(bench.SelfAttention):
    """Self-attention in a K x K window."""

    def __init__(self, layer: Layer, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(layer.spec.dim, layer.heads, device, dtype)
        self.kernel_size = layer.spec.kernel_size

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        return neighborhood_attention(q, k, v, grid, self.kernel_size)


def attention(layer: Layer, device: torch.device, dtype: torch.dtype) -> nn.Module:
    return bench.SelfAttention(layer.spec.dim, layer.heads, device, dtype)


def linear(layer: Layer, device: torch.device, dtype: torch.dtype) -> nn.Module:
    return LinearAttention(layer.spec.dim, layer.heads).to(device, dtype)


def deltaconv(layer: Layer, device: torch.device, dtype: torch.dtype) -> nn.Module:
    return DeltaConvBlock(layer.spec, device, dtype)


def lean(layer: Layer, device: torch.device, dtype: torch.dtype) -> nn.Module:
    return DeltaConvBlock(BlockSpec.lean(layer.spec.dim, layer.spec.kernel_size), device, dtype)


METHODS = {
    **{f"attention, {n}": Method(attention, partial(sdpa_kernel, kind)) for n, kind in KERNELS.items()},
    "LinFusion": Method(linear),
    "ΔConv, torch": Method(deltaconv, partial(choose.forced, "torch")),
    "ΔConv, triton": Method(deltaconv, partial(choose.forced, "triton")),
    "lean ΔConv": Method(lean),
    "neighborhood attention": Method(Neighborhood),
}


def main() -> int:
    command = parser(__doc__)
    command.add_argument("--preset", nargs="+", choices=presets(), default=["sd15-512"])
    command.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    command.add_argument("--batch", type=int, default=2, help="samples (%(default)s)")
    command.add_argument("--backward", action="store_true", help="forward and backward")
    command.add_argument("--patience", type=float, default=60, help="seconds for a run (%(default)s)")
    add_machine(command, repeats=7)
    args = command.parse_args()
    torch.manual_seed(0)
    device = bench.pick_device(args.device)
    dtype = bench.pick_dtype(args.dtype, device)
    results = Results(args.json, circumstances(device, dtype, args.small))
    rates = (bench.copy_bandwidth(device), bench.matmul_rate(device, dtype))
    print(f"copies {rates[0] / 1e9:,.0f} GB/s, matrix products {rates[1] / 1e12:,.2f} TFLOP/s")
    for preset in args.preset:
        for layer in presets(args.small)[preset]:
            key = {
                "preset": preset,
                "stage": layer.part,
                "grid": layer.grid,
                "channels": layer.spec.dim,
                "heads": layer.heads,
                "kernel_size": layer.spec.kernel_size,
                "batch": args.batch,
                "backward": args.backward,
            }
            row = results.find(**key)
            if row is None:
                case = Case(layer, args.batch, args.backward, device, dtype)
                measured = measure(case, args.only, args.repeats, args.patience, rates)
                row = results.add(key | {"bandwidth": rates[0], "rate": rates[1], "methods": measured})
            print(f"\n{title(row)}\n\n{table(row['methods'])}", flush=True)
    return 0


def presets(small: bool = False) -> dict[str, list[Layer]]:
    """Name -> layers; small ones have an eighth of the tokens along each side."""
    found = {
        f"{name}-{size}": distinct(bench.layers_of(name, bench.latent_of((size, size))))
        for name, sizes in MODELS.items()
        for size in sizes
    }
    found["paper"] = [Layer("", BlockSpec(640, 9), 10, grid) for grid in PAPER]
    found["kernel"] = [
        Layer("", BlockSpec(channels, kernel_size), channels // 64, (side, side))
        for side in (64, 128)
        for channels in (640, 1152)
        for kernel_size in (9, 13)
    ]
    if not small:
        return found
    return {name: [smaller(layer) for layer in layers[:2]] for name, layers in found.items()}


def smaller(layer: Layer) -> Layer:
    height, width = (max(2, side // 8) for side in layer.grid)
    return replace(layer, grid=(height, width))


def distinct(layers: list[Layer]) -> list[Layer]:
    """Without those that cost what an earlier one costs."""
    alike = {replace(layer, part="", sites=1): layer for layer in reversed(layers)}
    return [layer for layer in layers if layer in alike.values()]


class Failed(Exception):
    """A method cannot run."""

    def __init__(self, name: str, error: RuntimeError) -> None:
        super().__init__(name, reason(error))


@dataclass(frozen=True)
class Case:
    """A layer, how it is run, and the methods that it may be run with."""

    layer: Layer
    batch: int
    backward: bool
    device: torch.device
    dtype: torch.dtype
    methods: Mapping[str, Method] = field(default_factory=lambda: METHODS)

    def tokens(self) -> Tensor:
        height, width = self.layer.grid
        x = torch.randn(self.batch, height * width, self.layer.spec.dim, device=self.device)
        return x.to(self.dtype).requires_grad_(self.backward)

    def module(self, method: Method) -> nn.Module:
        return method.make(self.layer, self.device, self.dtype)

    def runner(self, name: str, module: nn.Module, x: Tensor) -> Callable[[], None]:
        """One pass of the layer; `Failed` where PyTorch fails."""
        context, grid = self.methods[name].context, self.layer.grid

        def forward() -> None:
            with torch.inference_mode(), context():
                module(x, grid)

        def both() -> None:
            with context():
                y = module(x, grid)
                y.backward(torch.ones_like(y))
            x.grad = None
            module.zero_grad(set_to_none=True)

        def run() -> None:
            try:
                (both if self.backward else forward)()
            except RuntimeError as error:
                x.grad = None
                raise Failed(name, error) from None

        return run

    def flops(self, method: Method) -> int:
        """Backward is twice forward for all that counts; the counter errs about depth-wise convolutions."""
        counted = replace(self, device=torch.device("meta"))
        module, x = counted.module(method), counted.tokens()
        with torch.inference_mode(not self.backward), choose.forced("torch"):
            return bench.count_flops(lambda: module(x, self.layer.grid)) * (3 if self.backward else 1)

    def least_bytes(self, module: nn.Module) -> int:
        """What any method must move: tokens in and out, weights; and backward the gradients of all."""
        weights = list(module.parameters())
        height, width = self.layer.grid
        numbers = 2 * self.batch * height * width * self.layer.spec.dim + sum(w.numel() for w in weights)
        return numbers * weights[0].element_size() * (3 if self.backward else 1)

    def refusal(self, name: str, seconds: float, patience: float) -> str | None:
        """Why a method is not run, if it is not; the seconds are those of its operations at full rate."""
        if seconds > patience:
            return f"would take about {seconds:,.0f} s"
        height, width = self.layer.grid
        scores = 8 * self.batch * self.layer.heads * (height * width) ** 2 * (2 if self.backward else 1)
        if name == "attention, math" and scores > 0.5 * available(self.device):
            return f"would take {scores / 2**30:,.0f} GiB"
        few = replace(self, layer=replace(self.layer, grid=(16, 16)))
        try:
            few.runner(name, few.module(self.methods[name]), few.tokens())()
        except DeltaConvError as error:  # a backend of ΔConv: "... is forced, but <reason>; <advice>"
            return str(error).partition(" but ")[2].partition(";")[0]
        except Failed:  # what PyTorch says names other kernels, and not why this one is out
            if name.startswith("attention"):
                return "not on this device"
            raise
        return None


def measure(
    case: Case, names: list[str], repeats: int, patience: float, rates: tuple[float, float]
) -> dict[str, Any]:
    """Method -> its figures, or why there are none; where runs are long, there are fewer of them."""
    figures: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], None]] = {}
    x = case.tokens()  # of all methods: several of them might not fit
    for name in names:
        flops = case.flops(case.methods[name])
        figures[name] = {"flops": flops}
        if reason := case.refusal(name, flops / rates[1], patience):
            figures[name]["skipped"] = reason
            continue
        try:
            module = case.module(case.methods[name])
            runs[name] = case.runner(name, module, x)
            figures[name] |= {"memory": peak(runs[name], case.device), "bytes": case.least_bytes(module)}
        except Failed as failed:
            figures[name]["skipped"] = failed.args[1]
            del runs[name]
    longest = max((figures[name]["flops"] / rates[1] for name in runs), default=1.0)
    turns = max(1, min(repeats, int(patience / longest)))
    for name, taken in timed(runs, case.device, turns, figures).items():
        seconds, known = statistics.median(taken), figures[name]
        known |= {"seconds": seconds, "of_bandwidth": known["bytes"] / seconds / rates[0]}
        known["of_products"] = known["flops"] / seconds / rates[1]
    return figures


def timed(
    runs: dict[str, Callable[[], None]], device: torch.device, turns: int, figures: dict[str, dict[str, Any]]
) -> dict[str, list[float]]:
    """Method -> seconds of each turn. One that fails after all is left out, and the others start again."""
    try:
        return bench.alternate(runs, device, turns)
    except Failed as failed:
        name, figures[name]["skipped"] = failed.args
    return timed({other: run for other, run in runs.items() if other != name}, device, turns, figures)


def title(row: dict[str, Any]) -> str:
    height, width = row["grid"]
    what = "forward and backward" if row["backward"] else "forward"
    return (
        f"{row['preset']} {row['stage']}: {height} x {width} tokens, C {row['channels']}, K "
        f"{row['kernel_size']}, batch {row['batch']}, {what}"
    )


def table(methods: dict[str, Any]) -> str:
    """A line for each method, and why some were not run."""
    own = [k["seconds"] for name, k in methods.items() if name.startswith("ΔConv") and "seconds" in k]
    fastest = min(own, default=None)
    lines = markdown([dict(cells(name, known, fastest)) for name, known in methods.items()])
    skipped = [f"{name}: {known['skipped']}" for name, known in methods.items() if "skipped" in known]
    return "\n".join([*lines, "", *skipped])


def cells(name: str, known: dict[str, Any], own: float | None) -> Iterator[tuple[str, str]]:
    seconds, memory = known.get("seconds"), known.get("memory")
    yield "method", name
    yield "ms", f"{1000 * seconds:,.2f}" if seconds else "–"
    yield "times ΔConv", f"{seconds / own:.2f}" if seconds and own else ""
    yield "MiB", "" if memory is None else f"{memory / 2**20:,.0f}"
    yield "GFLOP", f"{known['flops'] / 1e9:,.2f}"
    yield "of bandwidth", f"{known['of_bandwidth']:.0%}" if seconds else ""
    yield "of products", f"{known['of_products']:.0%}" if seconds else ""


if __name__ == "__main__":
    sys.exit(main())
