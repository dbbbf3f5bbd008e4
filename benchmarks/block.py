"""One layer: self-attention by every way that PyTorch has, LinFusion, ΔConv, and neighborhood attention.

    python benchmarks/block.py [--preset sd15-512 ...] [--backward] [--json FILE]

Whole layers with their projections, random weights and tokens, alternating runs, medians. Prints for each
method its time, that in units of ΔConv's fastest, the peak of memory above what was there before, floating
point operations as PyTorch's counter counts them (attention in its plain form; backward as twice forward),
and

- of bandwidth: the bytes that any method must move (tokens in, tokens out, weights) per second, as a part of
  what a large copy reaches on this device;
- of products: operations per second, as a part of what a large matrix product reaches in this dtype.

What would take longer than --patience at that rate, or more memory than there is, is left out, and says so.
Presets hold the self-attention layers of a model at a size of picture, each distinct one once; "paper" is the
layer of the paper's table 1, "kernel" those that a GPU's kernels are judged by.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from measure import Results, add_machine, available, circumstances, parser, peak
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from deltaconv_core import BlockSpec, DeltaConvBlock, bench
from deltaconv_core.bench import Layer
from deltaconv_core.linear_attention import LinearAttention
from deltaconv_core.markdown import markdown
from deltaconv_core.neighborhood import neighborhood_attention

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


METHODS = {
    **{f"attention, {n}": Method(attention, partial(sdpa_kernel, kind)) for n, kind in KERNELS.items()},
    "LinFusion": Method(linear),
    "ΔConv": Method(deltaconv),
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
                "stage": layer.stage,
                "grid": layer.grid,
                "channels": layer.spec.dim,
                "heads": layer.heads,
                "kernel_size": layer.spec.kernel_size,
                "batch": args.batch,
                "backward": args.backward,
            }
            row = results.find(**key)
            if row is None:
                measured = measure(layer, args, device, dtype, rates)
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
    alike = {replace(layer, stage="", sites=1): layer for layer in reversed(layers)}
    return [layer for layer in layers if layer in alike.values()]


def measure(
    layer: Layer, args: Any, device: torch.device, dtype: torch.dtype, rates: tuple[float, float]
) -> dict[str, Any]:
    """Method -> its figures, or why there are none."""
    figures: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], None]] = {}
    for name in args.only:
        method = METHODS[name]
        flops = bench.count_flops(counted(method, layer, args, dtype)) * (3 if args.backward else 1)
        figures[name] = {"flops": flops}
        reason = refusal(method, name, layer, args, device, dtype, flops / rates[1])
        if reason is None:
            try:
                module = method.make(layer, device, dtype)
                runs[name] = runner(method, module, layer, args, device, dtype)
                figures[name] |= {
                    "memory": peak(runs[name], device),
                    "bytes": least_bytes(module, layer, args),
                }
            except torch.OutOfMemoryError:
                reason = "out of memory"
                runs.pop(name, None)
        if reason is not None:
            figures[name]["skipped"] = reason
    for name, seconds in bench.alternate(runs, device, args.repeats).items():
        one, known = statistics.median(seconds), figures[name]
        known |= {"seconds": one, "of_bandwidth": known["bytes"] / one / rates[0]}
        known["of_products"] = known["flops"] / one / rates[1]
    return figures


def runner(
    method: Method, module: nn.Module, layer: Layer, args: Any, device: torch.device, dtype: torch.dtype
) -> Callable[[], None]:
    """One pass of the layer."""
    tokens = layer.grid[0] * layer.grid[1]
    x = torch.randn(args.batch, tokens, layer.spec.dim, device=device).to(dtype)
    x.requires_grad_(args.backward)

    def forward() -> None:
        with torch.inference_mode(), method.context():
            module(x, layer.grid)

    def both() -> None:
        x.grad = None
        module.zero_grad(set_to_none=True)
        with method.context():
            y = module(x, layer.grid)
            y.backward(torch.ones_like(y))

    return both if args.backward else forward


def counted(method: Method, layer: Layer, args: Any, dtype: torch.dtype) -> Callable[[], object]:
    """A forward pass on tensors without values.

    Backward is twice forward for all that counts; the counter itself is wrong about depth-wise convolutions.
    """
    meta, module = torch.device("meta"), method.make(layer, torch.device("meta"), dtype)
    x = torch.empty(args.batch, layer.grid[0] * layer.grid[1], layer.spec.dim, device=meta, dtype=dtype)
    return lambda: module(x, layer.grid)


def least_bytes(module: nn.Module, layer: Layer, args: Any) -> int:
    """What any method must read and write: tokens in and out, weights; and backward the gradients of all."""
    weights = list(module.parameters())
    tokens = 2 * args.batch * layer.grid[0] * layer.grid[1] * layer.spec.dim
    once = sum(weight.numel() for weight in weights) + tokens
    return once * weights[0].element_size() * (3 if args.backward else 1)


def refusal(
    method: Method,
    name: str,
    layer: Layer,
    args: Any,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
) -> str | None:
    """Why this method is not run here, if it is not."""
    if seconds > args.patience:
        return f"would take about {seconds:,.0f} s"
    tokens = layer.grid[0] * layer.grid[1]
    scores = 8 * args.batch * layer.heads * tokens**2 * (2 if args.backward else 1)
    if name == "attention, math" and scores > 0.8 * available(device):
        return f"would take {scores / 2**30:,.0f} GiB"
    few = replace(layer, grid=(4, 4))
    try:
        runner(method, method.make(few, device, dtype), few, args, device, dtype)()
    except RuntimeError:  # what PyTorch says names other kernels, and not why this one is out
        if name.startswith("attention"):
            return "not on this device"
        raise
    return None


def title(row: dict[str, Any]) -> str:
    height, width = row["grid"]
    what = "forward and backward" if row["backward"] else "forward"
    return (
        f"{row['preset']} {row['stage']}: {height} x {width} tokens, C {row['channels']}, K "
        f"{row['kernel_size']}, batch {row['batch']}, {what}"
    )


def table(methods: dict[str, Any]) -> str:
    """A line for each method."""
    own = [k["seconds"] for name, k in methods.items() if name.startswith("ΔConv") and "seconds" in k]
    fastest = min(own, default=None)
    return "\n".join(markdown([dict(cells(name, known, fastest)) for name, known in methods.items()]))


def cells(name: str, known: dict[str, Any], own: float | None) -> Iterator[tuple[str, str]]:
    seconds, memory = known.get("seconds"), known.get("memory")
    yield "method", name
    yield "ms", f"{1000 * seconds:,.2f}" if seconds else known["skipped"]
    yield "times ΔConv", f"{seconds / own:.2f}" if seconds and own else ""
    yield "MiB", "" if memory is None else f"{memory / 2**20:,.0f}"
    yield "GFLOP", f"{known['flops'] / 1e9:,.2f}"
    yield "of bandwidth", f"{known['of_bandwidth']:.0%}" if seconds else ""
    yield "of products", f"{known['of_products']:.0%}" if seconds else ""


if __name__ == "__main__":
    sys.exit(main())
