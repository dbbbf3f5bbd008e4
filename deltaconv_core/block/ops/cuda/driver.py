"""The little of the CUDA driver that loads a cubin and launches a kernel of it, called through ctypes.

Everything happens in PyTorch's context of a GPU (the primary one), whichever thread calls.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .nvrtc import CudaError

DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


class Driver:
    """The driver's library.

    Args:
        path: of the file, or a name that the system's loader knows.

    Raises:
        OSError: it is not installed.
        CudaError: it does not work.
    """

    def __init__(self, path: str = DRIVER) -> None:
        self.library = ctypes.CDLL(path)
        self.library.cuLaunchKernel.argtypes = [ctypes.c_void_p] + [ctypes.c_uint] * 7 + [ctypes.c_void_p] * 3
        self.call("cuInit", 0)

    def call(self, function: str, *arguments: Any) -> None:
        """Calls a function.

        Raises:
            CudaError: it failed.
        """
        if error := getattr(self.library, function)(*arguments):
            raise CudaError(f"{function}: {self.reason(error)}")

    def reason(self, error: int) -> str:
        """An error's number in words."""
        text = ctypes.c_char_p()
        self.library.cuGetErrorString(error, ctypes.byref(text))
        return (text.value or b"error %d" % error).decode()

    @functools.cache  # noqa: B019 - one driver, a few GPUs
    def context(self, index: int) -> ctypes.c_void_p:
        """PyTorch's context of a GPU, kept for the life of the process."""
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuDeviceGet", ctypes.byref(device), index)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        return context

    @contextmanager
    def inside(self, index: int) -> Iterator[None]:
        """Inside, the calling thread works in the context of a GPU."""
        self.call("cuCtxPushCurrent_v2", self.context(index))
        try:
            yield
        finally:
            self.library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def load(self, index: int, cubin: bytes, name: str) -> ctypes.c_void_p:
        """A kernel of a cubin on a GPU; it stays loaded.

        Raises:
            CudaError: the cubin is damaged, or for another GPU.
        """
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        with self.inside(index), self.relaxed():
            self.call("cuModuleLoadData", ctypes.byref(module), cubin)
            self.call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        return function

    def attribute(self, index: int, number: int, function: ctypes.c_void_p) -> int:
        """What `cuFuncGetAttribute` says of a kernel that is loaded on a GPU."""
        value = ctypes.c_int()
        with self.inside(index):
            self.call("cuFuncGetAttribute", ctypes.byref(value), number, function)
        return value.value

    @contextmanager
    def relaxed(self) -> Iterator[None]:
        """Inside, memory may be allocated also while this thread captures a CUDA graph."""
        mode = ctypes.c_int(RELAXED)
        self.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        try:
            yield
        finally:
            self.library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


class Launch:
    """A kernel with all arguments but its pointers, ready to be launched again and again.

    Args:
        pointers: how many arguments are pointers; they come first.
        numbers: the others, as ctypes values.
        grid, threads: how many blocks, and how many threads in each.
    """

    def __init__(
        self,
        driver: Driver,
        index: int,
        function: ctypes.c_void_p,
        pointers: int,
        numbers: Sequence[Any],
        grid: int,
        threads: int,
    ) -> None:
        self.driver, self.context = driver, driver.context(index)
        self.pointers = (ctypes.c_void_p * pointers)()
        self.numbers = tuple(numbers)
        start, step = ctypes.addressof(self.pointers), ctypes.sizeof(ctypes.c_void_p)
        places = [start + i * step for i in range(pointers)]
        self.places = (ctypes.c_void_p * (pointers + len(numbers)))(
            *places, *map(ctypes.addressof, self.numbers)
        )
        self.before = (function, grid, 1, 1, threads, 1, 1, 0)  # 0: bytes of shared memory
        self.former = ctypes.byref(ctypes.c_void_p())
        self.lock = threading.Lock()

    def __call__(self, stream: int, *pointers: int) -> None:
        """Launches it on a stream of its GPU; addresses as `Tensor.data_ptr` gives them.

        Raises:
            CudaError: the driver refuses.
        """
        library = self.driver.library
        with self.lock:  # the driver copies the arguments before it returns
            self.pointers[:] = list(pointers)
            error = library.cuCtxPushCurrent_v2(self.context)
            if not error:
                error = library.cuLaunchKernel(*self.before, stream, self.places, None)
                library.cuCtxPopCurrent_v2(self.former)
        if error:
            raise CudaError(f"cuLaunchKernel: {self.driver.reason(error)}")
