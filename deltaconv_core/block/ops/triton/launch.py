"""How a kernel is launched: by triton at first, then directly.

Triton's own launch works out in Python, each time, which of the compiled kernels its arguments need: tens of
microseconds, more than a small kernel takes. What it passes on to the driver's launcher is the same for the
same shapes and dtypes, but for the stream and the addresses of tensors. So the second launch for a key is
watched, and those that follow pass the same with their own addresses. The key has to say all that a kernel's
arguments depend on: every shape, stride, dtype, number and option, and the device.

A direct launch needs triton's `CompiledKernel` to be what it is in 3.6 and 3.7. Where anything differs from
that, where triton's hooks watch launches, and on ROCm (whose compiled kernels depend on how large
memory is), triton launches as ever.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....util.once import Once
from ..operators import on_device

try:
    from triton.knobs import runtime
except ImportError:  # before 3.4
    runtime = None

log = logging.getLogger(__name__)
say = Once(log.info)

MOST_KEYS = 1024  # of one kernel, that are remembered
MOST_IMAGES = 65535  # of one launch: what CUDA takes along the second and the third axis of a grid
NOTICED = 1.0  # seconds of a first launch, from which on it is reported
ALIGNED = 16  # bytes: triton compiles a kernel for addresses that are multiples of this
BEFORE_ARGUMENTS = 9  # grid (3), stream, function, metadata, metadata of the launch, hooks (2)


class LaunchArguments(NamedTuple):
    """What a kernel is called with beside its tensors.

    Args:
        grid: tile sizes -> number of programs along each axis.
        numbers: the arguments after the tensors.
        options: its compile-time constants, without tile sizes.
    """

    grid: Callable[[dict[str, int]], tuple[int, ...]]
    numbers: tuple[float, ...]
    options: dict[str, Any]


def too_many(x: Tensor) -> bool:
    """Whether x has more images than a GPU takes along the axes of a grid that count them."""
    return len(x) > MOST_IMAGES


def turns(*tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The tensors (B, ...), or None, in parts of no more images than that."""
    batch = max(len(tensor) for tensor in tensors if tensor is not None)
    for first in range(0, batch, MOST_IMAGES):
        yield tuple(t if t is None else t[first : first + MOST_IMAGES] for t in tensors)


def dtypes(tensors: Sequence[Tensor]) -> list[torch.dtype]:
    """Of each tensor."""
    return [tensor.dtype for tensor in tensors]


Recorded = tuple[Callable[[list[int]], None] | None, Sequence[Tensor]]
"""A direct launch, or None where triton launched, and its tensors."""


class _Thread(threading.local):
    """What is recorded in a thread, and whether only triton launches."""

    record: list[Recorded] | None = None
    by_triton = False


thread = _Thread()


@contextmanager
def recording() -> Iterator[list[Recorded]]:
    """The launches of this thread; their tensors are kept alive."""
    record: list[Recorded] = []
    thread.record = record
    try:
        yield record
    finally:
        thread.record = None


@contextmanager
def launched_by_triton() -> Iterator[None]:
    """Nothing is launched directly in this thread."""
    thread.by_triton = True
    try:
        yield
    finally:
        thread.by_triton = False


class NotMeasured(Exception):
    """Nothing can be measured at this moment."""


class LaunchedKernel:
    """A kernel whose tile sizes triton's autotuner chooses, except where that cannot measure."""

    trusted = True  # False once direct launches gave another result than triton's (`inference`)
    forgotten = 0  # how often any kernel forgot: no tape of direct launches outlives that

    def __init__(self, tuner: Any) -> None:
        self.tuner = tuner
        self.lock = threading.RLock()  # triton's autotuner serves one thread at a time
        self.forget()

    def forget(self) -> None:
        """Nothing is launched directly until triton has launched it again."""
        LaunchedKernel.forgotten += 1
        self.compiled: dict[Hashable, Any] = {}  # launched once; None: not to be watched (again)
        self.direct: dict[Hashable, Callable[[list[int]], None]] = {}

    def launch(self, key: Hashable, tensors: Sequence[Tensor], call: Callable[[], LaunchArguments]) -> None:
        """Launches the kernel on the GPU of its tensors.

        Args:
            key: see the head of this file.
            tensors: the kernel's first arguments.
            call: returns the others; it is asked as long as the kernel is not launched directly.
        """
        addresses, bits = [], 0
        for tensor in tensors:
            address = tensor.data_ptr()
            bits |= address
            addresses.append(address)
        if bits % ALIGNED:
            key = key, tuple(address % ALIGNED == 0 for address in addresses)
        direct = self.direct.get(key) if LaunchedKernel.trusted and not thread.by_triton else None
        if direct is not None and not launches_watched():
            direct(addresses)
        else:
            direct = None
            with self.lock, on_device(tensors[0]):
                self._by_triton(key, tensors, call())
        if thread.record is not None:
            thread.record.append((direct, tensors))

    def _by_triton(self, key: Hashable, tensors: Sequence[Tensor], call: LaunchArguments) -> None:
        say("ΔConv: Triton compiles its kernels on first use, a few seconds each; they are kept on disk")

        def launch() -> Any:
            return self.tuner[call.grid](*tensors, *call.numbers, **call.options)

        try:
            if key not in self.compiled:
                if len(self.compiled) >= MOST_KEYS:
                    self.forget()
                begun = time.perf_counter()
                kernel = launch()
                self._tell(time.perf_counter() - begun)
                self.compiled[key] = kernel if _can_be_watched(kernel) else None
            elif self.compiled[key] is None:
                launch()
            else:
                direct = _watch(self.compiled[key], launch, tensors)
                self.compiled[key] = None
                if direct is not None:
                    self.direct[key] = direct
        except NotMeasured:
            chosen = self.tuner.configs[0].all_kwargs()
            self.tuner.fn[call.grid](*tensors, *call.numbers, **call.options, **chosen)

    def _tell(self, seconds: float) -> None:
        if seconds > NOTICED:
            log.info(f"ΔConv: {self.tuner.fn.__name__.strip('_')} compiled in {seconds:.0f} s")


class InterpretedKernel:
    """A kernel in triton's interpreter, with tile sizes that are always the same."""

    def __init__(self, kernel: Any, tiles: dict[str, int]) -> None:
        self.kernel, self.tiles = kernel, tiles

    def launch(self, key: Hashable, tensors: Sequence[Tensor], call: Callable[[], LaunchArguments]) -> None:
        """See `LaunchedKernel.launch`."""
        given = call()
        self.kernel[given.grid(self.tiles)](*tensors, *given.numbers, **given.options, **self.tiles)


def launches_watched() -> bool:
    """Whether a profiler asked triton to tell it of launches, or may have done so."""
    try:
        return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)
    except AttributeError:
        return True


def _can_be_watched(kernel: Any) -> bool:
    return torch.version.hip is None and not launches_watched() and callable(getattr(kernel, "_run", None))


def _watch(
    kernel: Any, launch: Callable[[], Any], tensors: Sequence[Tensor]
) -> Callable[[list[int]], None] | None:
    """Launches, and returns a function that does so again with other addresses; None if that is uncertain."""
    run, passed = kernel._run, []

    def recorder(*arguments: Any) -> Any:
        passed.append(arguments)
        return run(*arguments)

    kernel._run = recorder
    try:
        launch()
    finally:
        kernel._run = run
    return _repeated(kernel, run, passed[0], tensors) if len(passed) == 1 else None


def _repeated(
    kernel: Any, run: Any, passed: tuple[Any, ...], tensors: Sequence[Tensor]
) -> Callable[[list[int]], None] | None:
    from triton.runtime import driver

    grid, (stream, function, metadata), arguments = passed[:3], passed[3:6], passed[BEFORE_ARGUMENTS:]
    device, current_device = driver.active.get_current_device(), driver.active.get_current_device
    current_stream = driver.active.get_current_stream
    as_expected = (
        len(passed) >= BEFORE_ARGUMENTS
        and all(type(size) is int for size in grid)
        and stream == current_stream(device)
        and function is kernel.function
        and metadata is kernel.packed_metadata
        and passed[7] is runtime.launch_enter_hook
        and passed[8] is runtime.launch_exit_hook
        and len(arguments) >= len(tensors)
        and all(given is tensor for given, tensor in zip(arguments, tensors, strict=False))
        and not any(isinstance(given, Tensor) for given in arguments[len(tensors) :])
    )
    if not as_expected:
        return None
    rest = arguments[len(tensors) :]

    def direct(addresses: list[int]) -> None:
        if current_device() == device:
            run(*grid, current_stream(device), function, metadata, None, None, None, *addresses, *rest)
        else:
            with torch.cuda.device(device):
                direct(addresses)

    return direct
