"""Tile sizes, and where there are several, how the choice is made and kept.

A block's forward has one configuration for each kernel, so that its first call compiles nothing in vain. On
an H100 none that it timed is more than 15 % slower than the best of those tried before, whose times are in
benchmarks/results/gpu_h100.jsonl. The gradient of the depth-wise weights is timed with each of its
configurations when it first meets a new (dtype, K, channels, bucket) on a GPU of a new name, where the bucket
is the number of positions rounded up to a power of two. Where triton's autotuner can keep results on disk, it
does. Compiled kernels always stay there; image sizes are not compiled into them.

While a CUDA graph is captured, or without the memory that measuring needs, the first configuration is taken
and nothing is remembered. (Loading a new kernel may end a capture: run each dtype and kernel size before it.)
"""

import functools
import inspect
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.testing

from .launch import InterpretedKernel, LaunchedKernel, NotMeasured

Config = tuple[dict[str, int], int]  # tile sizes, and the number of warps (32 threads each)

# A depth-wise tile holds 2 * ROWS * COLS * CHANNELS float32 sums in registers: at most 64 in each thread,
# with which the unrolled row of K taps fills 255 registers and spills next to nothing (12 bytes in the first
# tile at K 13 on compute capability 9.0; 128 sums spill). A thread has VECTOR neighboring channels of
# COLS * CHANNELS / (32 * warps * VECTOR) columns and of all ROWS rows. For a multiply-add it reads 2 / ROWS
# bytes of pixels and 2 / columns bytes of weights (16 bit) from the L1 cache, which gives about one, so both
# want to be 4. Shared memory: none where ROWS * CHANNELS is below the number of threads (each thread loads
# the weights that it needs itself); otherwise 32 KiB, for the weights of a tap.
DEPTHWISE: Sequence[Config] = (({"ROWS": 4, "COLS": 64, "CHANNELS": 32, "VECTOR": 2}, 8),)
# KERNEL_COLS (K rounded up to a power of two, at most 32) * COLS * CHANNELS sums: at most 64 in each thread.
DEPTHWISE_WEIGHT: Sequence[Config] = (
    ({"COLS": 4, "CHANNELS": 32}, 2),
    ({"COLS": 4, "CHANNELS": 64}, 4),
    ({"COLS": 8, "CHANNELS": 32}, 4),
)
# ROWS * COLUMNS float32 sums in registers (at most 128 in each thread), and num_stages (3) operands of
# (ROWS + COLUMNS) * DEPTH in shared memory: 3 * 128 * 32 * 4 B = 48 KiB in float32, less in 16 bits; AMD's
# GPUs have 64 KiB, NVIDIA's from compute capability 8.0 on 99 KiB or more.
PROJECT: Sequence[Config] = (({"ROWS": 64, "COLUMNS": 64, "DEPTH": 32}, 4),)
# One read, a few additions, one write: nothing to budget.
RESAMPLE: Sequence[Config] = (({"COLS": 16, "CHANNELS": 64}, 4),)
# The mean token: ROWS * CHANNELS sums, and COLUMNS * DEPTH entries of a weight. No GPU has timed these two.
MEAN: Sequence[Config] = (({"ROWS": 16, "CHANNELS": 64}, 4),)
PRODUCT: Sequence[Config] = (({"COLUMNS": 16, "DEPTH": 64}, 4),)


@triton.jit
def nothing():
    """The least that can be compiled and launched."""


# Whether kernels run in triton's interpreter (TRITON_INTERPRET=1), on any device and for their results alone.
INTERPRETED = not isinstance(nothing, triton.JITFunction)

QUICK = {"warmup": 3, "rep": 15}  # milliseconds in which one configuration is timed


def tuned(
    configs: Sequence[Config], interpreted: dict[str, int], key: Sequence[str]
) -> Callable[[Any], LaunchedKernel | InterpretedKernel]:
    """Decorates a kernel, which is then launched without its tile sizes.

    Args:
        configs: what may be chosen from.
        interpreted: the tile sizes in triton's interpreter, where each program is slow and any size is right.
        key: the kernel's arguments whose values call for a choice of their own.
    """

    def decorate(kernel: Any) -> LaunchedKernel | InterpretedKernel:
        if INTERPRETED:
            return InterpretedKernel(kernel, interpreted)
        choices = [triton.Config(tiles, num_warps=warps) for tiles, warps in configs]
        return LaunchedKernel(triton.autotune(choices, list(key), **autotuner_options())(kernel))

    return decorate


def bucket(positions: int) -> int:
    """The exponent of the power of two that a number of positions is rounded up to."""
    return (positions - 1).bit_length()


@functools.cache
def number_of_gpu(device: torch.device) -> int:
    """A number that stands for the GPU's name, among what tile sizes are remembered for.

    Triton remembers them on disk by compute capability, which an H100 and an H200 share.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return zlib.crc32(name.encode()) & 0x7FFF_FFFF


def autotuner_options() -> dict[str, Any]:
    """What this version of triton's autotuner takes."""
    known = inspect.signature(triton.autotune).parameters
    options: dict[str, Any] = {}
    if "do_bench" in known:
        options["do_bench"] = _measured
    else:
        options.update(QUICK)
    if "cache_results" in known:
        options["cache_results"] = True
    return options


def _measured(launch: Callable[[], Any], quantiles: Sequence[float]) -> Any:
    if torch.cuda.is_current_stream_capturing():
        raise NotMeasured
    try:
        return triton.testing.do_bench(launch, quantiles=quantiles, **QUICK)
    except torch.cuda.OutOfMemoryError as error:
        raise NotMeasured from error
