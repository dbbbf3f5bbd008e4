"""The Triton kernels on this machine's GPU: right, and how fast beside PyTorch's own operators.

    python -m benchmarks.triton_check [--quick] [--large] [--json FILE]

Each line is one ΔConvBlock at real sizes. The errors are relative, against the float64 reference: of the
output and the worst of all gradients, by Triton and by plain PyTorch in the same dtype. The times are
medians of alternating runs, in milliseconds: forward without autograd, then forward and backward. Exits with
status 1 when an error is above twice PyTorch's, or when there is no GPU that triton supports.

--quick takes two cases. --large adds one whose tensors have more than 2^31 entries (needs some 30 GB). The
first run of a kernel compiles and times its tile sizes (minutes for all cases); both are kept on disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaconv_core import BlockSpec, DeltaConvBlock, bench
from deltaconv_core.block.ops import choose
from deltaconv_core.block.ops.triton import BACKEND
from deltaconv_core.block.reference import reference_block
from testing.compare import relative_l2

SIDES = ("triton", "torch")
RUNS = 20
CASES = [
    *((size, BlockSpec(dim, K)) for size in ((64, 64), (128, 128)) for dim in (640, 1152) for K in (9, 13)),
    ((64, 64), BlockSpec(320, 7)),
    ((32, 32), BlockSpec(640, 5)),
    ((8, 8), BlockSpec(1280, 3)),
    ((67, 93), BlockSpec(320, 11, scales=(1.0, 0.5, 1 / 3), gate="scaled", merge="sum")),
    ((45, 61), BlockSpec(1152, 13, gate="sigmoid", depthwise_bias=True)),
]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Row:
    """One block in one dtype; pairs are (triton, torch)."""

    size: tuple[int, int]
    dim: int
    kernel_size: int
    dtype: str
    output_error: tuple[float, ...]
    gradient_error: tuple[float, ...]
    forward_ms: tuple[float, ...]
    training_ms: tuple[float, ...]
    wrong: list[str]

    def __str__(self) -> str:
        figures = [f"{a:9.1e} {b:8.1e}" for a, b in (self.output_error, self.gradient_error)]
        figures += [f"{a:9.3f} {b:8.3f} {b / a:5.1f}x" for a, b in (self.forward_ms, self.training_ms)]
        name = f"{self.size[0]}x{self.size[1]} C{self.dim} K{self.kernel_size} {self.dtype}"
        return f"{name:28}" + "".join(figures) + (f"  WRONG: {', '.join(self.wrong)}" if self.wrong else "")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two cases only")
    parser.add_argument("--large", action="store_true", help="add tensors of more than 2^31 entries")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("This machine has no CUDA or ROCm GPU that PyTorch can use; nothing was checked.")
        return 1
    reason = BACKEND.why_not(torch.empty(1, device="cuda"))
    if reason:
        print(f"Nothing was checked: {reason}.")
        return 1
    machine = describe()
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"{'':28}{'output error':>18}{'gradient error':>18}{'forward ms':>25}{'training ms':>25}")
    print(f"{'':28}" + f"{'triton':>9} {'torch':>8}" * 2 + f"{'triton':>9} {'torch':>8}       " * 2)
    rows = []
    for size, spec in CASES[7:9] if arguments.quick else CASES:
        for dtype in DTYPES:
            rows.append(measure(size, spec, dtype))
            print(rows[-1], flush=True)
    failed = any(row.wrong for row in rows)
    if arguments.large:
        failed |= not large_offsets()
    if arguments.json:
        content = {"machine": machine, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return int(failed)


def describe() -> dict[str, str]:
    import triton

    names = {"GPU": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    return {key: str(value) for key, value in names.items()}


def measure(size: tuple[int, int], spec: BlockSpec, dtype: torch.dtype) -> Row:
    torch.manual_seed(0)
    block = DeltaConvBlock(spec, device="cuda")
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5 / max(1, parameter[0].numel()) ** 0.5)
    block = block.to(dtype)
    x = torch.randn(2, size[0] * size[1], spec.dim, device="cuda", dtype=dtype)
    upstream = torch.randn_like(x)

    def forward() -> Tensor:
        return block(x, size)

    truth = exact(block, x, size, upstream)
    found = {}
    for side in SIDES:
        with choose.forced(side):
            found[side] = gradients(forward, block, x, upstream)
    errors = {side: {k: relative_l2(found[side][k], truth[k]) for k in truth} for side in SIDES}
    rounding = torch.finfo(dtype).eps / 2
    wrong = [k for k in truth if not errors["triton"][k] <= max(2 * errors["torch"][k], rounding)]

    def train() -> None:
        forward().backward(upstream)

    with torch.no_grad():
        forward_ms = times(forward)
    return Row(
        size,
        spec.dim,
        spec.kernel_size,
        str(dtype).removeprefix("torch."),
        tuple(errors[side]["output"] for side in SIDES),
        tuple(max(v for k, v in errors[side].items() if k != "output") for side in SIDES),
        forward_ms,
        times(train),
        wrong,
    )


def exact(block: DeltaConvBlock, x: Tensor, size: tuple[int, int], upstream: Tensor) -> dict[str, Tensor]:
    """Output and gradients by the reference in float64."""
    weights = {k: v.detach().double().requires_grad_() for k, v in block.named_parameters()}
    tokens = x.detach().double().requires_grad_()
    y = reference_block(tokens, size, block.spec, weights)
    y.backward(upstream.double())
    return {"output": y.detach(), "x": _known(tokens.grad), **{k: _known(v.grad) for k, v in weights.items()}}


def gradients(
    forward: Callable[[], Tensor], block: DeltaConvBlock, x: Tensor, upstream: Tensor
) -> dict[str, Tensor]:
    block.zero_grad()
    x.grad = None
    x.requires_grad_()
    y = forward()
    y.backward(upstream)
    found = {"output": y.detach(), "x": _known(x.grad)}
    found |= {k: _known(v.grad).clone() for k, v in block.named_parameters()}
    x.grad = None
    return found


def _known(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient


def times(function: Callable[[], Any]) -> tuple[float, ...]:
    """Median milliseconds of each side."""

    def by(side: str) -> None:
        with choose.forced(side):
            function()

    taken = bench.alternate({side: partial(by, side) for side in SIDES}, torch.device("cuda"), RUNS)
    return tuple(1000 * statistics.median(taken[side]) for side in SIDES)


def large_offsets() -> bool:
    """The last rows of the second of two images of 1080 x 1920 positions and 640 channels."""
    height, width, channels, K = 1080, 1920, 640, 5
    u = torch.randn(2, height, width, channels, device="cuda", dtype=torch.float16)
    weight = torch.randn(channels, 1, K, K, device="cuda", dtype=torch.float16) / K
    part = u[1:, -16:].contiguous()
    last = BACKEND.depthwise_gate(u, weight, None, "sigmoid")[1, -8:].clone()
    same = torch.equal(last, BACKEND.depthwise_gate(part, weight, None, "sigmoid")[0, -8:])
    small = BACKEND.shrink(u, 0.5, "average")[1, -4:].clone()
    same &= torch.equal(small, BACKEND.shrink(part, 0.5, "average")[0, -4:])
    del u
    stage = torch.randn(2, height, width, channels // 2, device="cuda", dtype=torch.float16)
    matrix = torch.randn(2 * channels, channels // 2, device="cuda", dtype=torch.float16) / 20
    bias = torch.zeros(2, 1, 2 * channels, device="cuda", dtype=torch.float16)
    y = BACKEND.project([stage], matrix, bias, (height, width), "concat")[1, -width:].clone()
    few = BACKEND.project([stage[1:, -1:].contiguous()], matrix, bias[:1], (1, width), "concat")[0]
    same &= bool((y - few).abs().max() <= 0.01 * few.abs().max())
    print(f"offsets beyond 2^31: {'right' if same else 'WRONG'}")
    return same


if __name__ == "__main__":
    sys.exit(main())
