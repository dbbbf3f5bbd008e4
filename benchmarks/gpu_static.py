"""The GPU kernels without a GPU: compiled, their machine code read, and a block's time predicted from that.

    python -m benchmarks.gpu_static [--sm 80 90] [--dtype float16 ...] [--kernel-size 9 13] [--json FILE]

Triton's wheel compiles its kernels and takes them apart; NVRTC compiles the one for tensor cores where it can
be loaded (`pip install nvidia-cuda-nvrtc`, or a PyTorch for CUDA). Prints for each kernel and configuration

- registers of a thread, bytes spilled, warps that a multiprocessor holds;
- instructions of a warp in the longest loop, outside of it, and the commonest ones in it;

and for each block, batch 2, microseconds by the model below, with the best configuration of each kernel:

- bound: tokens in and out and weights at the speed of a copy, or the formula's operations at the speed of a
  matrix product, whichever takes longer. No implementation can be faster;
- depthwise: both stages of the convolution with its gate; block: everything, and as a multiple of the bound.

The model: a kernel takes as long as the multiprocessor with most of its programs needs to issue their
instructions, one in each cycle of a scheduler, or to feed its tensor cores, or as its bytes take, or 2.2 µs,
whatever is longest. Kernels that PyTorch brings are counted by bytes and operations. Waiting is not in it, so
a kernel takes at least as long. Rates: `GPUS` below.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from deltaconv_core import BlockSpec
from deltaconv_core.block.flops import block_flops
from deltaconv_core.util.text import markdown
from testing.machine_code import MachineCode, mix, read_cubin, short, triton_code

from .harness import parser


@dataclass(frozen=True)
class Gpu:
    """Rates that the model takes for granted.

    Args:
        sms: multiprocessors, of 4 schedulers each.
        clock: Hz.
        copies, cached: bytes per second from memory, and where all of it fits into the L2 cache.
        cache: bytes that do.
        products: floating point operations per second of a large matrix product in 16 bits.
        mma: opcode -> cycles that it occupies a scheduler's tensor core.
    """

    name: str
    sms: int
    clock: float
    copies: float
    cached: float
    cache: float
    products: float
    mma: dict[str, float]


# An H100's rates are measured ones of that card, but `mma`, which is 62 % of the peak: what kernels with this
# instruction reach there. An A100's are the same parts of its data sheet's, and the peak of `mma`.
GPUS = {
    80: Gpu(
        "A100",
        108,
        1.41e9,
        1.8e12,
        3.6e12,
        30e6,
        252e12,
        {"HMMA.16816": 8, "HMMA.1688": 4, "HMMA.1688.TF32": 8},
    ),
    90: Gpu(
        "H100",
        132,
        1.755e9,
        3.0e12,
        4.5e12,
        40e6,
        798e12,
        {"HMMA.16816": 6.5, "HMMA.1688": 3.6, "HMMA.1688.TF32": 6.5},
    ),
}
TINY = 2.2e-6  # seconds of a kernel that does next to nothing
SHARE = 0.75  # of the rate of large products that those of a block reach
SMALL_KERNELS = 2  # of a block by Triton: the product of the mean token, the taps transposed
OF_PLANES = 3  # of a block on tensor cores: the mean's second step, its product, the bias
BATCH = 2
BLOCKS = [(side, channels) for side in (64, 128, 256) for channels in (320, 640, 1152)]
TYPES = {"float16": "fp16", "bfloat16": "bf16"}
ROWS = (8, 16, 32, 64, 128)  # of a unit of the kernel for tensor cores
UNITS, COLUMNS = 16, 8  # of a warp of it, and of a unit


Tiles = dict[str, int]
Configurations = list[tuple[Tiles, MachineCode]]


@dataclass(frozen=True)
class Compiled:
    """All configurations of each kernel, for one GPU, dtype and kernel size.

    Args:
        depthwise, project, half_project, pool: by Triton. half_project is the product of the smaller stage,
            to which nothing is added.
        by_rows: project as it is for AMD's GPUs, which scale rows of float16; listed, but in no prediction.
        of_planes: project and half_project of stages (B, c, H, W), which the kernel for tensor cores writes.
        tensor_cores: the kernel for tensor cores, or why there is none.
    """

    depthwise: Configurations
    project: Configurations
    half_project: Configurations
    pool: Configurations
    of_planes: tuple[Configurations, Configurations]
    by_rows: Configurations
    tensor_cores: MachineCode | str

    def codes(self) -> Iterator[MachineCode]:
        of_stages = (self.project, self.by_rows, self.half_project, *self.of_planes)
        for several in (self.depthwise, *of_stages, self.pool):
            yield from (code for _, code in several)
        if isinstance(self.tensor_cores, MachineCode):
            yield self.tensor_cores


def main() -> int:
    command = parser(__doc__)
    command.add_argument("--sm", nargs="+", type=int, choices=GPUS, default=list(GPUS))
    command.add_argument("--dtype", nargs="+", choices=TYPES, default=list(TYPES))
    command.add_argument("--kernel-size", nargs="+", type=int, default=[9, 13], metavar="K")
    command.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    args = command.parse_args()
    rows: list[dict[str, Any]] = []
    codes: dict[tuple[int, str], MachineCode] = {}
    reasons: dict[str, None] = {}
    for sm in args.sm:
        for dtype in args.dtype:
            for K in args.kernel_size:
                print(f"compiling for sm_{sm}, {dtype}, K {K} ...", file=sys.stderr, flush=True)
                compiled = compile_all(sm, TYPES[dtype], K)
                codes |= {(sm, code.name): code for code in compiled.codes()}
                if isinstance(compiled.tensor_cores, str):
                    reasons[compiled.tensor_cores] = None
                about = {"sm": sm, "dtype": dtype, "K": K}
                rows += [about | predicted(GPUS[sm], compiled, side, c, K, dtype) for side, c in BLOCKS]
    for sm in args.sm:
        print(f"\nKernels for sm_{sm} ({GPUS[sm].name})\n")
        print("\n".join(markdown([described(code) for (s, _), code in codes.items() if s == sm])))
    for sm in args.sm:
        print(f"\nBlocks on sm_{sm} ({GPUS[sm].name}), batch {BATCH}, predicted microseconds\n")
        print("\n".join(markdown([cells(row) for row in rows if row["sm"] == sm])))
    for reason in reasons:
        print(f"\nWithout the kernel for tensor cores: {reason}.")
    if args.json:
        figures = [{"sm": sm, **described(code)} for (sm, _), code in codes.items()]
        args.json.write_text(
            json.dumps({"kernels": figures, "blocks": rows}, indent=1) + "\n", encoding="utf-8"
        )
    return 0


# ---- compile ----


def compile_all(sm: int, dtype: str, K: int) -> Compiled:
    """Args: sm, compute capability times ten; dtype by triton's name; K, kernel size."""
    product = "fp32" if dtype == "fp16" else dtype  # of the gate
    gate = dict.fromkeys(("u", "weight", "bias", "upstream"), dtype) | {"out": product}
    convolution = {"HALF": 160, "K": K, "STEP": 0, "SIGMOID": False, "HAS_BIAS": False}
    stages = dict.fromkeys(("stage", "first", "second"), product)
    to_tokens, to_product = (
        stages | dict.fromkeys(("weight", "bias"), dtype) | {"out": t} for t in (dtype, product)
    )
    matrix = {
        "HAS_STAGE": True,
        "HALF": False,
        "LARGEST": 2.0**15,
        "TF32": dtype == "fp16",
        "WIDE": False,
        "FLOAT32": "tf32" if dtype == "fp16" else "ieee",
        "PLANES": False,
    }
    by_rows = {"HALF": True, "TF32": False, "FLOAT32": "ieee"}
    alone, added = matrix | {"HAS_BIAS": False, "SMALLER": 0}, matrix | {"HAS_BIAS": True, "SMALLER": 1}
    planes = {"PLANES": True}
    both = {"source": dtype, "out": dtype}
    codes = partial(triton_codes, sm)
    return Compiled(
        codes(f"depthwise {dtype} K{K}", "depthwise_gate._depthwise", gate, convolution),
        codes(f"project {dtype}", "project._project", to_tokens, added),
        codes(f"project half {dtype}", "project._project", to_product, alone),
        codes(f"pool {dtype}", "pool._pool", both, {"ADJOINT": False}),
        (
            codes(f"project planes {dtype}", "project._project", to_tokens, added | planes),
            codes(f"project planes half {dtype}", "project._project", to_product, alone | planes),
        ),
        codes(f"project by rows {dtype}", "project._project", to_tokens, added | by_rows)
        if dtype == "fp16"
        else [],
        tensor_core_code(sm, dtype, K),
    )


def triton_codes(
    sm: int, name: str, kernel: str, pointers: dict[str, str], constants: dict[str, Any]
) -> Configurations:
    """A Triton kernel, "module.function", in each of its configurations."""
    module, function = kernel.split(".")
    tuner = getattr(import_module(f"deltaconv_core.block.ops.triton.{module}"), function).tuner
    found = []
    for config in tuner.configs:
        tiles = dict(config.kwargs)
        full = f"{name} {'/'.join(map(str, tiles.values()))}"
        found.append((tiles, triton_code(full, tuner, config, pointers, constants, sm)))
    return found


def tensor_core_code(sm: int, dtype: str, K: int) -> MachineCode | str:
    """The kernel for tensor cores, or why it cannot be compiled, as a clause."""
    try:
        build = import_module("deltaconv_core.block.ops.cuda.build")
        cuda = import_module("deltaconv_core.block.ops.cuda.launcher")
    except ImportError as error:
        return f"this version has none ({error})"
    if K not in cuda.KERNEL_SIZES:
        return f"it takes K of {min(cuda.KERNEL_SIZES)} to {max(cuda.KERNEL_SIZES)}, not {K}"
    macros = {"K": K, "BF16": int(dtype == "bf16"), "OUT": int(dtype == "fp16")}
    macros |= {"SIG": 0, "BIAS": 0, "WARPS": cuda.WARPS}
    try:
        cubin = build.builder.nvrtc().compile(build.kernel_text(), divmod(sm, 10), macros)
    except (OSError, RuntimeError) as error:
        return f"NVRTC cannot compile it here ({error})"
    return read_cubin(f"tensor cores {dtype} K{K}", cubin, 0, cuda.WARPS)


# ---- the model ----


def seconds(
    gpu: Gpu, code: MachineCode, programs: int, trips: float, moved: float, operations: float = 0.0
) -> float:
    """How long a kernel takes, by the model in the head of this file.

    Args:
        programs: that it is launched with.
        trips: through its longest loop.
        moved: bytes.
        operations: floating point operations of the products that are not among `Gpu.mma`.
    """
    warps = -(-programs // gpu.sms) * code.warps / 4  # of a scheduler
    if programs < gpu.sms:
        warps = max(1.0, warps)
    issue = warps * (code.outside.total() + trips * code.inside.total())
    tensor = warps * (mma_cycles(gpu, code.outside) + trips * mma_cycles(gpu, code.inside))
    product = operations / (SHARE * gpu.products)
    return max(issue / gpu.clock, tensor / gpu.clock, product, copied(gpu, moved), TINY)


def mma_cycles(gpu: Gpu, counts: Mapping[str, int]) -> float:
    return sum(gpu.mma.get(short(opcode), 0) * count for opcode, count in counts.items())


def copied(gpu: Gpu, moved: float) -> float:
    """Seconds in which bytes are read and written."""
    return moved / (gpu.cached if moved < gpu.cache else gpu.copies)


def bound(gpu: Gpu, spec: BlockSpec, side: int) -> float:
    """Seconds that no implementation of a block can be below."""
    moved = 2 * (2 * BATCH * side**2 * spec.dim + spec.num_parameters)
    return max(moved / gpu.copies, BATCH * block_flops(spec, (side, side)) / gpu.products)


def predicted(gpu: Gpu, compiled: Compiled, side: int, channels: int, K: int, dtype: str) -> dict[str, Any]:
    """The figures of one block, in seconds."""
    spec = BlockSpec(channels, K)
    half, wide = spec.inter // 2, 4 if dtype == "float16" else 2  # bytes of an entry of a gated stage
    slowness = 2 if dtype == "float16" else 1  # of tf32
    stages = [(side // by, BATCH * (side // by) ** 2) for by in (1, 2)]
    (_, n), (small, fewer) = stages
    product = 2 * n * channels * spec.inter / (SHARE * gpu.products)

    def projections(full: Configurations, smaller: Configurations) -> dict[str, float]:
        moved = n * (2 * channels + wide * half) + fewer * wide * channels
        return {
            "half project": best(
                smaller,
                lambda t, code: project_seconds(
                    gpu, code, t, fewer, channels, half, fewer * wide * (half + channels), slowness
                ),
            ),
            "project": best(
                full, lambda t, code: project_seconds(gpu, code, t, n, channels, half, moved, slowness)
            ),
        }

    mean = max(copied(gpu, 2 * n * channels), TINY)
    parts = {
        "mean": mean,
        "small": SMALL_KERNELS * TINY,
        **projections(compiled.project, compiled.half_project),
        "up": max(product, copied(gpu, 2 * n * (channels + spec.inter)), TINY),
        "pool": best(
            compiled.pool,
            lambda t, code: seconds(
                gpu,
                code,
                BATCH * small * cdiv(small, t["COLS"]) * cdiv(spec.inter, t["CHANNELS"]),
                2,
                2 * spec.inter * (n + fewer),
            ),
        ),
    }
    on_planes = {
        "mean": mean,
        "small": OF_PLANES * TINY,
        **projections(*compiled.of_planes),
        # The bias is written first, and the product adds itself to it.
        "bias": max(copied(gpu, 2 * n * spec.inter), TINY),
        "up": max(product, copied(gpu, 2 * n * (channels + 2 * spec.inter)), TINY),
        "pool": max(copied(gpu, 2 * spec.inter * (n + fewer)), TINY),
    }
    ways: dict[str, list[float]] = {"depthwise": [], "tensor cores": []}
    for size, positions in stages:
        moved = positions * half * (4 + wide)
        ways["depthwise"].append(
            best(
                compiled.depthwise,
                lambda t, code, size=size, moved=moved: depthwise_seconds(gpu, code, t, size, half, K, moved),
            )
        )
        if isinstance(compiled.tensor_cores, MachineCode):
            ways["tensor cores"].append(tensor_core_seconds(gpu, compiled.tensor_cores, size, half, K, moved))
    row: dict[str, Any] = {
        "side": side,
        "channels": channels,
        "bound": bound(gpu, spec, side),
        "parts": parts,
        "parts on tensor cores": on_planes,
    }
    others = {"depthwise": ("block", parts), "tensor cores": ("block on tensor cores", on_planes)}
    for name, (block, rest) in others.items():
        if ways[name]:
            row |= {name: sum(ways[name]), block: sum(ways[name]) + sum(rest.values())}
    return row


def best(configurations: Configurations, taken: Callable[[Tiles, MachineCode], float]) -> float:
    return min(taken(tiles, code) for tiles, code in configurations)


def depthwise_seconds(
    gpu: Gpu, code: MachineCode, tiles: Tiles, side: int, half: int, K: int, moved: float
) -> float:
    """A turn of the loop is a row of the image."""
    programs = cdiv(side, tiles["ROWS"]) * cdiv(side, tiles["COLS"]) * cdiv(half, tiles["CHANNELS"]) * BATCH
    return seconds(gpu, code, programs, tiles["ROWS"] + K - 1, moved)


def project_seconds(
    gpu: Gpu,
    code: MachineCode,
    tiles: Tiles,
    positions: int,
    channels: int,
    half: int,
    moved: float,
    slowness: float,
) -> float:
    """A turn of the loop is DEPTH channels of the stage; slowness: of the product, against 16 bits."""
    programs = cdiv(positions, tiles["ROWS"]) * cdiv(channels, tiles["COLUMNS"])
    turns = cdiv(half, tiles["DEPTH"])
    return seconds(gpu, code, programs, turns, moved, slowness * 2 * positions * channels * half)


def tensor_core_seconds(gpu: Gpu, code: MachineCode, side: int, half: int, K: int, moved: float) -> float:
    """A turn of the loop is K rows; a warp has UNITS units of COLUMNS columns and the best of ROWS."""

    def taken(rows: int) -> float:
        warps = cdiv(cdiv(side, COLUMNS) * cdiv(side, rows), UNITS) * half * BATCH
        return seconds(gpu, code, cdiv(warps, code.warps), (rows + K - 1) / K, moved)

    return min(map(taken, ROWS))


def cdiv(a: int, b: int) -> int:
    return math.ceil(a / b)


# ---- print ----


def described(code: MachineCode) -> dict[str, str]:
    return {
        "kernel": code.name,
        "registers": str(code.registers),
        "spilled": str(code.spilled),
        "shared": str(code.shared),
        "warps": str(code.warps_at_once()),
        "loop": str(code.inside.total()),
        "outside": str(code.outside.total()),
        "in the loop": mix(code.inside),
    }


def cells(row: dict[str, Any]) -> dict[str, str]:
    def us(name: str) -> str:
        return f"{1e6 * row[name]:,.0f}" if name in row else "–"

    def times(name: str) -> str:
        return f"{row[name] / row['bound']:.1f}" if name in row else "–"

    return {
        "tokens": f"{row['side']}²",
        "C": str(row["channels"]),
        "K": str(row["K"]),
        "dtype": row["dtype"],
        "bound": us("bound"),
        "depthwise": us("depthwise"),
        "block": us("block"),
        "of bound": times("block"),
        "on tensor cores": us("tensor cores"),
        "its block": us("block on tensor cores"),
        "its of bound": times("block on tensor cores"),
    }


if __name__ == "__main__":
    sys.exit(main())
