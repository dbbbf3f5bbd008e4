"""Depth-wise K x K convolution and gate on tensor cores, over planes: (B, 2 h, H, W) -> (B, h, H, W)."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....errors import DeltaConvError
from ....util.compiling import constant_result
from ..operators import operator
from .build import builder
from .driver import Launch
from .nvrtc import CudaError

_DTYPES = (torch.float16, torch.bfloat16)
KERNEL_SIZES = range(3, 14, 2)  # larger ones do not fit the registers
_OLDEST_GPU = (8, 0)
WARPS = 4  # of a block of threads; each works alone
UNIT_COLUMNS = 8  # of a unit
UNITS = 16  # of a warp
ROWS = (8, 16, 32, 64, 128)  # of a unit, that may be chosen
MOST_WARPS = 2**31 - WARPS
REGISTERS = 65536  # of a multiprocessor of 32 bits each
OF_FUNCTION = 4  # CU_FUNC_ATTRIBUTE_NUM_REGS


def why_not(u: Tensor, taps: Tensor) -> str:
    """Why `depthwise_gate` does not run on such tensors, as a clause; nothing if it does.

    The first call for a GPU loads NVRTC and the driver, and launches a kernel that does nothing.
    """
    return unsuited(u.device, u.dtype, u.shape[3], taps.shape[3])


def unsuited(device: torch.device, dtype: torch.dtype, width: int, kernel_size: int) -> str:
    """The same, for planes of a width."""
    if device.type != "cuda":
        return f"x is on a {device.type.upper()} and the kernel for tensor cores needs an NVIDIA GPU"
    if dtype not in _DTYPES:
        return f"x is {_name(dtype)} and the kernel for tensor cores takes float16 and bfloat16"
    if kernel_size not in KERNEL_SIZES:
        return f"K is {kernel_size} and the kernel for tensor cores takes odd K from 3 to 13"
    if width % 2:
        return f"the grid has {width} columns and the kernel for tensor cores takes even numbers"
    reason: str = _why_not_on(device.index)
    return reason


@constant_result
def _why_not_on(index: int | None) -> str:
    return _tried(torch.cuda.current_device() if index is None else index)


@functools.cache
def _tried(index: int) -> str:
    if torch.version.hip is not None:
        return "this is a ROCm GPU and the kernel for tensor cores is NVIDIA's"
    capability = torch.cuda.get_device_capability(index)
    if capability < _OLDEST_GPU:
        return "the GPU's compute capability is {}.{} and the kernel for tensor cores needs 8.0".format(
            *capability
        )
    try:
        function = builder.function(index, "nothing")
        Launch(builder.driver(), index, function, 0, (), 1, 32)(_stream(index))
    except (OSError, CudaError, AttributeError) as error:  # AttributeError: a library without a function
        return f"kernels for tensor cores cannot be compiled or launched here ({error})"
    return ""


def numbers_for(half: int, size: tuple[int, int], batch: int, rows: int) -> tuple[int, ...]:
    """kernel.cu's half, H, W, R, blocks, tiles and total."""
    blocks = math.ceil(size[1] / UNIT_COLUMNS)
    tiles = math.ceil(blocks * math.ceil(size[0] / rows) / UNITS)
    return half, *size, rows, blocks, tiles, tiles * half * batch


def defines_for(
    dtype: torch.dtype, out_dtype: torch.dtype, kernel_size: int, has_bias: bool, sigmoid: bool
) -> tuple[tuple[str, int], ...]:
    """kernel.cu's macros."""
    return (
        ("K", kernel_size),
        ("BF16", int(dtype == torch.bfloat16)),
        ("OUT", int(out_dtype == torch.float32)),
        ("SIG", int(sigmoid)),
        ("BIAS", int(has_bias)),
        ("WARPS", WARPS),
    )


def rows_of_a_unit(half: int, size: tuple[int, int], batch: int, kernel_size: int, at_once: int) -> int:
    """How many rows a unit should have: K - 1 more are read, but fewer rows make more warps.

    Args:
        at_once: how many warps the GPU runs at a time.
    """

    def cost(rows: int) -> float:
        turns = numbers_for(half, size, batch, rows)[-1] / at_once
        return max(turns, 1.0) * (rows + kernel_size - 1)

    return min(ROWS, key=cost)


def _empty(
    u: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    sigmoid: bool,
    factor: float,
    out_dtype: torch.dtype,
    rows: int,
) -> Tensor:
    return u.new_empty(u.shape[0], u.shape[1] // 2, *u.shape[2:], dtype=out_dtype)


def _flops(u: Sequence[int], taps: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(u) * taps[-1] ** 2


@operator(
    "tensor_core_depthwise_gate",
    "(Tensor u, Tensor taps, Tensor? bias, bool sigmoid, float factor, ScalarType out_dtype, int rows)"
    " -> Tensor",
    _empty,
    flops=_flops,
)
def _gate(
    u: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    sigmoid: bool,
    factor: float,
    out_dtype: torch.dtype,
    rows: int,
) -> Tensor:
    out = _empty(u, taps, bias, sigmoid, factor, out_dtype, rows)
    if not out.numel():
        return out
    u, taps = _aligned(u), taps.contiguous()
    bias = taps if bias is None else bias.contiguous()
    index = u.get_device()
    try:
        launch = _launch(
            index, u.dtype, out_dtype, tuple(u.shape), taps.shape[3], bias is not taps, sigmoid, factor, rows
        )
        launch(_stream(index), u.data_ptr(), taps.data_ptr(), bias.data_ptr(), out.data_ptr())
    except (OSError, CudaError) as error:
        raise DeltaConvError(
            f"the kernel for tensor cores failed ({error}); set DELTACONV_BACKEND=torch, which always works"
        ) from error
    return out


@functools.lru_cache(maxsize=512)
def _launch(
    index: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    kernel_size: int,
    has_bias: bool,
    sigmoid: bool,
    factor: float,
    rows: int,
) -> Launch:
    batch, channels, *size = shape
    half, (height, width) = channels // 2, size
    defines = defines_for(dtype, out_dtype, kernel_size, has_bias, sigmoid)
    function = builder.function(index, "depthwise_gate", defines)
    at_once = _warps_at_once(index, function)
    rows = rows or rows_of_a_unit(half, (height, width), batch, kernel_size, at_once)
    numbers = numbers_for(half, (height, width), batch, rows)
    if numbers[-1] > MOST_WARPS:
        raise DeltaConvError(
            f"{batch} images of {height} x {width} are too many at once; make the batch smaller"
        )
    grid = math.ceil(numbers[-1] / WARPS)
    arguments = [*map(ctypes.c_int, numbers), ctypes.c_float(factor)]
    return Launch(builder.driver(), index, function, 4, arguments, grid, 32 * WARPS)


def _warps_at_once(index: int, function: ctypes.c_void_p) -> int:
    """How many warps of a kernel a GPU runs at a time, by their registers."""
    registers = builder.driver().attribute(index, OF_FUNCTION, function)
    blocks = REGISTERS // (WARPS * 32 * math.ceil(registers / 8) * 8)
    return int(torch.cuda.get_device_properties(index).multi_processor_count) * blocks * WARPS


def _aligned(u: Tensor) -> Tensor:
    """Contiguous, and at an address that pairs of entries can be read from."""
    u = u.contiguous()
    return u.clone() if u.data_ptr() % 4 else u


def _stream(index: int) -> int:
    return int(torch.cuda.current_stream(index).cuda_stream)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def depthwise_gate(
    u: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    sigmoid: bool,
    factor: float,
    out_dtype: torch.dtype,
    rows: int = 0,
) -> Tensor:
    """K x K depth-wise convolution with zeros around, then the gate of the two halves a, b of the channels.

    Sums are float32. There are no gradients. An infinite or missing number in u may make NaN of a few columns
    more than the kernel reaches.

    Args:
        u: (B, 2 h, H, W) float16 or bfloat16, W even.
        taps: (2 h, 1, K, K), K odd from 3 to 13, u's dtype.
        bias: (2 h), u's dtype, or None.
        sigmoid: a * sigmoid(b); otherwise a * b * factor.
        factor: of the gate.
        out_dtype: u's dtype, or float32.
        rows: how many rows of the image a thread goes down, at least 1; 0: as many as seem best.

    Returns:
        (B, h, H, W), contiguous.

    Raises:
        DeltaConvError: the kernel does not take such arguments, or does not run here.
    """
    fits = taps.shape[1:3] == (1, taps.shape[3]) and len(taps) == u.shape[1] and not u.shape[1] % 2
    if not fits or (bias is not None and bias.shape != taps.shape[:1]):
        shapes = [tuple(t.shape) for t in (u, taps, bias) if t is not None]
        raise DeltaConvError(
            f"expected u (B, c, H, W), taps (c, 1, K, K) and bias (c) with c even, got {shapes}"
        )
    if {t.dtype for t in (u, taps, bias) if t is not None} != {u.dtype} or out_dtype not in (
        u.dtype,
        torch.float32,
    ):
        raise DeltaConvError(
            "expected u, taps and bias of one dtype and a result of that or float32, got "
            f"{u.dtype}, {taps.dtype}, {None if bias is None else bias.dtype} and {out_dtype}"
        )
    if rows < 0:
        raise DeltaConvError(f"expected at least 1 row to a unit, or 0 to have it chosen, got {rows}")
    if reason := why_not(u, taps):
        raise DeltaConvError(f"{reason}; set DELTACONV_BACKEND=torch, which always works")
    result: Tensor = _gate(u, taps, bias, sigmoid, float(factor), out_dtype, rows)
    return result
