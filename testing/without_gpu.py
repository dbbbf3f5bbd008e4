"""Triton without a GPU: kernels are compiled for an H100, launched as ever, and nothing runs.

What a launch costs in Python is the same then. Tensors are on the CPU; what kernels would write is left as it
was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

SHARED = 227 * 1024  # bytes that a program may have


@dataclass
class Launches:
    """What was launched.

    Args:
        kept: whether `calls` is filled: (name, grid, arguments) of each launch.
        number: of launches.
    """

    kept: bool = False
    number: int = 0
    calls: list[tuple[str, tuple[int, int, int], tuple[Any, ...]]] = field(default_factory=list)


class _Utils:
    """Stands for triton's library around the driver."""

    def load_binary(self, name: str, *_: Any) -> tuple[Any, ...]:
        return name, name, 64, 0, 1024  # module, function, registers, spilled, threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED}


class Driver:
    """Triton's driver, of an H100 that is not there."""

    def __init__(self, launches: Launches) -> None:
        self.utils = _Utils()
        self.launches = launches

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Makes the function that launches a kernel; the function knows its kernel by name."""
        launches = self.launches

        def launch(x: int, y: int, z: int, stream: int, name: str, *arguments: Any) -> None:
            launches.number += 1
            if launches.kept:
                launches.calls.append((name, (x, y, z), arguments[4:]))

        return launch

    def get_current_target(self) -> Any:
        """Compute capability 9.0."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0


def launched_kernels() -> list[Any]:
    """ΔConv's kernels."""
    from deltaconv_core.block.ops.triton import depthwise_gate, enlarge, mean, pool, project
    from deltaconv_core.block.ops.triton.launch import LaunchedKernel

    modules = depthwise_gate, enlarge, mean, pool, project
    found = [value for module in modules for value in vars(module).values()]
    return [value for value in found if isinstance(value, LaunchedKernel)]


def _forget() -> None:
    """What is compiled for one driver is not launched by another."""
    for kernel in launched_kernels():
        kernel.forget()
        kernel.tuner.fn.device_caches.clear()


@contextmanager
def stand_in() -> Iterator[Launches]:
    """ΔConv's Triton backend runs on tensors of the CPU and launches nothing."""
    from triton.runtime import driver

    from deltaconv_core.block.ops import choose
    from deltaconv_core.block.ops.triton import by_triton

    launches = Launches()
    with ExitStack() as stack:
        stack.enter_context(patch.object(driver, "_active", Driver(launches)))
        stack.enter_context(patch.object(by_triton, "_tried", lambda kind, index: None))
        stack.enter_context(patch.object(by_triton, "_why_not_on", lambda kind, index: None))
        stack.enter_context(choose.forced("triton"))
        _forget()
        stack.callback(_forget)
        yield launches
