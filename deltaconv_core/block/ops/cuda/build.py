"""kernel.cu as functions of a GPU: compiled when first needed, and kept on disk for later processes.

Cubins lie in `cubins` beside the file that DELTACONV_TUNE_CACHE names; nowhere if it names none.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ....util.once import Once
from ....util.whole_file import replacing
from .. import fastest
from . import nvrtc
from .driver import Driver
from .nvrtc import CudaError, Nvrtc

log = logging.getLogger(__name__)

KERNEL_FILE = Path(__file__).with_name("kernel.cu")
EMPTY_KERNEL = 'extern "C" __global__ void nothing() {}'

Defines = tuple[tuple[str, int], ...]


class Builder:
    """What this process has loaded and compiled."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.say = Once(log.info)
        self.reset()

    def reset(self) -> None:
        """As in a new process; what is on disk stays."""
        self._nvrtc: Nvrtc | None = None
        self._driver: Driver | None = None
        self.functions: dict[tuple[int, str, Defines], Any] = {}
        self.say.reset()

    def nvrtc(self) -> Nvrtc:
        """The compiler.

        Raises:
            OSError: there is none.
        """
        with self.lock:
            if self._nvrtc is None:
                self._nvrtc = nvrtc.load(torch.version.cuda)
            return self._nvrtc

    def driver(self) -> Driver:
        """The driver.

        Raises:
            OSError, CudaError: there is none that works.
        """
        with self.lock:
            if self._driver is None:
                self._driver = Driver()
            return self._driver

    def function(self, index: int, name: str, defines: Defines = ()) -> Any:
        """A kernel on a GPU, for `driver.Launch`.

        Args:
            name: "depthwise_gate", with all the macros that kernel.cu asks for, or "nothing".

        Raises:
            OSError, CudaError: it cannot be compiled or loaded.
        """
        key = index, name, defines
        found = self.functions.get(key)
        if found is None:
            with self.lock:
                found = self.functions.get(key) or self._load(index, name, defines)
                self.functions[key] = found
        return found

    def _load(self, index: int, name: str, defines: Defines) -> Any:
        source = EMPTY_KERNEL if name == "nothing" else kernel_text()
        capability = torch.cuda.get_device_capability(index)
        path = self._place(source, capability, defines)
        if path is not None and (cubin := _read(path)):
            try:
                return self.driver().load(index, cubin, name)
            except CudaError as error:
                log.warning("ΔConv: %s cannot be used (%s), so the kernel is compiled again", path, error)
        cubin = self._compile(source, capability, dict(defines))
        function = self.driver().load(index, cubin, name)
        if path is not None:
            _keep(path, cubin)
        return function

    def _compile(self, source: str, capability: tuple[int, int], defines: Mapping[str, int]) -> bytes:
        if defines:
            self.say(
                f"ΔConv: compiling a kernel for tensor cores (K {defines['K']}, a few seconds); it is kept"
            )
        return self.nvrtc().compile(source, capability, defines)

    def _place(self, source: str, capability: tuple[int, int], defines: Defines) -> Path | None:
        choices = fastest.cache_file()
        if choices is None:
            return None
        content = repr((source, capability, self.nvrtc().version, defines))
        return choices.parent / "cubins" / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.cubin"


builder = Builder()


@functools.cache
def kernel_text() -> str:
    """kernel.cu."""
    return KERNEL_FILE.read_text(encoding="utf-8")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _keep(path: Path, cubin: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_bytes(cubin)
    except OSError as error:
        log.warning("ΔConv: cannot write %s (%s); the kernel is compiled again next time", path, error)
