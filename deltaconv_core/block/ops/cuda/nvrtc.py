"""NVIDIA's run-time compiler, called through ctypes: CUDA C++ in, machine code for one kind of GPU out.

PyTorch's wheels bring the library (as a package `nvidia-cuda-nvrtc*` on Linux, in `torch/lib` on Windows), so
neither a CUDA toolkit nor a C++ compiler is needed.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

PATTERN = "nvrtc64_*.dll" if sys.platform == "win32" else "libnvrtc*.so*"
PLACES = ("cuda_nvrtc/lib", "cuda_nvrtc/bin", "cu*/lib", "cu*/bin", "cu*/bin/*")  # in the package `nvidia`


class CudaError(RuntimeError):
    """A call of NVRTC or of the driver failed; says which, and why as far as the library does."""


class Nvrtc:
    """The library.

    Args:
        path: of the file, or a name that the system's loader knows.

    Raises:
        OSError: it cannot be loaded.
    """

    def __init__(self, path: str) -> None:
        if sys.platform == "win32" and os.path.dirname(path):
            os.add_dll_directory(
                os.path.dirname(path)
            )  # its own library of built-in functions lies beside it
        self.path = path
        self.library = ctypes.CDLL(path)
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"

    def compile(self, source: str, capability: tuple[int, int], defines: Mapping[str, int]) -> bytes:
        """A cubin.

        Args:
            source: CUDA C++ without includes.
            capability: of the GPU, such as (9, 0).
            defines: macros.

        Raises:
            CudaError: the source does not compile, or this version does not know the GPU.
        """
        options = [
            "--gpu-architecture=sm_{}{}".format(*capability),
            "--std=c++17",
            *(f"-D{name}={value}" for name, value in defines.items()),
        ]
        program = ctypes.c_void_p()
        self._check("nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
        try:
            texts = (ctypes.c_char_p * len(options))(*map(str.encode, options))
            failed = self.library.nvrtcCompileProgram(program, len(options), texts)
            if failed:
                reason = self._log(program) or self._reason(failed)
                raise CudaError(f"NVRTC {self.version}, {options[0]}: {reason}")
            return self._bytes(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN")
        finally:
            self.library.nvrtcDestroyProgram(ctypes.byref(program))

    def _log(self, program: ctypes.c_void_p) -> str:
        text = self._bytes(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")
        return text.rstrip(b"\0").decode(errors="replace").strip()

    def _bytes(self, program: ctypes.c_void_p, size_of: str, get: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(size_of, program, ctypes.byref(size))
        content = ctypes.create_string_buffer(size.value)
        self._check(get, program, content)
        return content.raw

    def _check(self, function: str, *arguments: object) -> None:
        if error := getattr(self.library, function)(*arguments):
            raise CudaError(f"{function}: {self._reason(error)}")

    def _reason(self, error: int) -> str:
        text: bytes = self.library.nvrtcGetErrorString(error)
        return text.decode()


def load(cuda: str | None) -> Nvrtc:
    """The library that belongs to PyTorch, or else any other.

    Args:
        cuda: `torch.version.cuda`, such as "13.0": a library of that version is preferred.

    Raises:
        OSError: there is none, or none can be loaded.
    """
    reasons = []
    for path in sorted(library_paths(), key=lambda path: not _fits(path, cuda)):
        try:
            return Nvrtc(path)
        except (OSError, AttributeError, CudaError) as error:  # another library, or half of one
            reasons.append(f"{path}: {error}")
    raise OSError("; ".join(reasons) or "NVRTC is not installed; pip install nvidia-cuda-nvrtc brings it")


def library_paths() -> Iterator[str]:
    """Paths of libraries in the order in which they are looked for; the last may be a bare name."""
    for folder in (*_beside_torch(), *_in_nvidia_packages(), *_in_toolkit()):
        for path in sorted(folder.glob(PATTERN), reverse=True):
            if not re.search(r"builtins|\.alt\.|static", path.name):
                yield str(path)
    if name := ctypes.util.find_library("nvrtc"):
        yield name


def _beside_torch() -> Iterator[Path]:
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        yield Path(spec.origin).parent / "lib"


def _in_nvidia_packages() -> Iterator[Path]:
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for place in PLACES:
            yield from sorted(Path(folder).glob(place), reverse=True)


def _in_toolkit() -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if folder := os.environ.get(variable):
            yield Path(folder) / ("bin" if sys.platform == "win32" else "lib64")


def _fits(path: str, cuda: str | None) -> bool:
    """Whether a library is of CUDA's major version, by its name: libnvrtc-1a2b.so.13, nvrtc64_130_0.dll."""
    found = re.search(r"\.so\.(\d+)|nvrtc64_(\d+)\d_", os.path.basename(path))
    return found is not None and cuda is not None and (found[1] or found[2]) == cuda.partition(".")[0]
