"""The depth-wise convolution and its gate on an NVIDIA GPU's tensor cores. Importing it compiles nothing.

| file | what is in it |
|---|---|
| `kernel.cu` | the kernel; its head says how it works |
| `nvrtc.py` | finds NVIDIA's run-time compiler, and calls it |
| `driver.py` | loads and launches what was compiled |
| `build.py` | when something is compiled, and where it is kept |
| `by_cuda.py` | `CudaBackend`, what `ops.backend` describes |
| `launcher.py` | the operator that PyTorch sees, and why it does not run |

It needs neither triton nor a CUDA toolkit: PyTorch's CUDA wheels bring the compiler.
"""

from .by_cuda import CudaBackend
from .launcher import depthwise_gate, why_not

BACKEND = CudaBackend()

__all__ = ["BACKEND", "CudaBackend", "depthwise_gate", "why_not"]
