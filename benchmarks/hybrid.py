"""One layer of hybrid mixers from 64 x 64 to 256 x 256 tokens, beside attention, LinFusion and ΔConv.

    python -m benchmarks.hybrid [--side 64 128 ...] [--channels 640] [--backward] [--json FILE]
    python -m benchmarks.hybrid --operators [--side 64 ...] [--channels 640]

Whole layers with their projections, random weights and tokens, as in `block.py`, whose columns these are.
Also printed is how time and memory for each token grow from the smallest side to the largest one: 1 is linear
in the tokens.

With --operators nothing is timed: printed is how many operators of PyTorch that compute or copy something a
call of a mixer has, between the projections, in float16 as a GPU goes its way, how many of these do nothing
but copy, and how much. PyTorch's attention is one of them, and copies nothing where its strides are right.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deltaconv_core import BlockSpec, bench
from deltaconv_core.bench import Layer
from deltaconv_core.block import ops
from deltaconv_core.mixers.hybrid import HybridMixer, HybridSpec, nystrom
from deltaconv_core.util.text import markdown

from . import block
from .block import Case, Method, measure, table, title
from .harness import Results, add_machine, circumstances, parser

SIDES = (64, 96, 128, 192, 256)
KERNEL_SIZE = 9  # of the authors' block
SPECS: dict[str, dict[str, Any]] = {
    "hybrid, Nyström 64": {"landmarks": 64, "nystrom": "cholesky"},
    "hybrid, Newton 64": {"landmarks": 64, "nystrom": "newton"},
    "hybrid, Nyström 144": {"landmarks": 144, "nystrom": "cholesky"},
    "hybrid, pooled 64": {"landmarks": 64, "nystrom": "none"},
    "hybrid, pooled 64, K 5": {"landmarks": 64, "nystrom": "none", "kernel_size": 5, "mean": True},
    "hybrid, window 5, pooled 64": {"landmarks": 64, "nystrom": "none", "window": 5},
}
OTHERS = ("attention", "LinFusion", "ΔConv, torch", "ΔConv, triton", "lean ΔConv")


class Hybrid(bench.SelfAttention):
    """Self-attention's projections with a hybrid mixer between them."""

    def __init__(
        self, fields: dict[str, Any], layer: Layer, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(layer.spec.dim, layer.heads, device, dtype)
        spec = HybridSpec(layer.spec.dim, layer.heads, layer.spec.dim // layer.heads, **fields)
        self.mixer = HybridMixer(spec, device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.mixer(q, k, v, grid)


class Operators(TorchDispatchMode):
    """Counts operators that compute or copy, and the bytes of those that only copy."""

    def __init__(self) -> None:
        super().__init__()
        self.number = self.copies = self.copied = 0
        self.attending = False

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        out = function(*arguments, **(options or {}))
        aten = torch.ops.aten
        if self.attending or function.is_view or function.overloadpacket in (aten.empty, aten._unsafe_view):
            return out
        self.number += 1
        if function.overloadpacket in (aten.clone, aten.copy_, aten._to_copy, aten.cat, aten.stack):
            self.copies += 1
            self.copied += out.nbytes
        return out

    def attend(
        self, *arguments: Any, attend: Any = torch.nn.functional.scaled_dot_product_attention, **options: Any
    ) -> Any:
        self.number, self.attending = self.number + 1, True
        try:
            return attend(*arguments, **options)
        finally:
            self.attending = False


def operators(fields: dict[str, Any], channels: int, side: int) -> dict[str, str]:
    heads = channels // 64
    mixer = HybridMixer(HybridSpec(channels, heads, 64, **fields)).requires_grad_(False)
    q, k, v = (torch.randn(2, side**2, heads, 64).half().transpose(1, 2) for _ in range(3))
    seen = Operators()
    as_on_a_gpu = (
        patch.object(ops, "compute_dtype", lambda x: x.dtype),
        patch.object(nystrom, "products_are_faster", lambda a: a.shape[-1] <= nystrom.MOST_BY_PRODUCTS),
        patch.object(torch.nn.functional, "scaled_dot_product_attention", seen.attend),
    )
    with as_on_a_gpu[0], as_on_a_gpu[1], as_on_a_gpu[2], torch.no_grad(), seen:
        mixer(q, k, v, (side, side))
    return {
        "operators": str(seen.number),
        "copies": str(seen.copies),
        "MiB copied": f"{seen.copied / 2**20:.1f}",
        "MiB of q": f"{q.nbytes / 2**20:.1f}",
    }


METHODS = {
    "attention": Method(block.attention),
    **{name: method for name, method in block.METHODS.items() if name in OTHERS},
    **{name: Method(partial(Hybrid, fields)) for name, fields in SPECS.items()},
}


def main() -> int:
    command = parser(__doc__)
    command.add_argument("--side", type=int, nargs="+", default=list(SIDES), help="of the square of tokens")
    command.add_argument("--channels", type=int, default=640, help="C (%(default)s)")
    command.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    command.add_argument("--batch", type=int, default=1, help="samples (%(default)s)")
    command.add_argument("--backward", action="store_true", help="forward and backward")
    command.add_argument("--patience", type=float, default=60, help="seconds for a run (%(default)s)")
    command.add_argument("--operators", action="store_true", help="count operators and copies of a call")
    add_machine(command, repeats=5)
    args = command.parse_args()
    if args.operators:
        for side in args.side:
            rows = [
                {"mixer": name} | operators(SPECS[name], args.channels, side)
                for name in SPECS
                if name in args.only
            ]
            print(f"\n{side} x {side} tokens, C {args.channels}, batch 2\n\n" + "\n".join(markdown(rows)))
        return 0
    torch.manual_seed(0)
    device = bench.pick_device(args.device)
    dtype = bench.pick_dtype(args.dtype, device)
    sides = [max(2, side // 8) for side in args.side] if args.small else args.side
    results = Results(args.json, circumstances(device, dtype, args.small))
    rates = (bench.copy_bandwidth(device), bench.matmul_rate(device, dtype))
    rows = []
    for side in sides:
        layer = Layer("", BlockSpec(args.channels, KERNEL_SIZE), args.channels // 64, (side, side))
        key = {"grid": layer.grid, "channels": args.channels, "batch": args.batch, "backward": args.backward}
        row = results.find(**key)
        if row is None:
            case = Case(layer, args.batch, args.backward, device, dtype, METHODS)
            measured = measure(case, args.only, args.repeats, args.patience, rates)
            named = {"preset": "hybrid", "stage": "", "kernel_size": KERNEL_SIZE, "methods": measured}
            row = results.add(key | named)
        rows.append(row)
        print(f"\n{title(row)}\n\n{table(row['methods'])}", flush=True)
    print(f"\n{growth(rows)}")
    return 0


def growth(rows: list[dict[str, Any]]) -> str:
    """Time and memory for each token on the largest side, those on the smallest one being 1."""
    first, last = rows[0], rows[-1]
    more = last["grid"][0] * last["grid"][1] / (first["grid"][0] * first["grid"][1])
    lines = []
    for name, known in last["methods"].items():
        before = first["methods"].get(name, {})
        cells = {
            what: f"{known[what] / before[what] / more:.2f}" if known.get(what) and before.get(what) else ""
            for what in ("seconds", "memory", "flops")
        }
        lines.append({"for each token": name, **cells})
    return "\n".join(markdown(lines))


if __name__ == "__main__":
    sys.exit(main())
