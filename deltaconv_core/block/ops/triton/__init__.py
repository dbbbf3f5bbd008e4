"""The block's steps as Triton kernels, for CUDA and ROCm GPUs. Importing this package does not import triton.

| file | what is in it |
|---|---|
| `by_triton.py` | `TritonBackend`, what `ops.backend` describes; needs no triton to be imported |
| `depthwise_gate.py` | depth-wise convolution and gate in one kernel, and both gradients |
| `project.py` | output projection; its kernel adds the bias and the enlarged smaller stages as it writes |
| `enlarge.py` | bilinear interpolation as a device function, and the kernel of its adjoint |
| `pool.py` | adaptive average pooling and its adjoint, one kernel |
| `mean.py` | the mean token and its projection, without autograd |
| `inference.py`, `tape.py` | a whole block without autograd; the same again with other addresses |
| `tuning.py` | the tile sizes that may be chosen from, and when they are chosen |
| `launch.py` | a kernel's launch, direct from the third of its kind on |

Sums are float32. Nothing here waits for the GPU, except the measurements that choose a tile size the first
time a shape of a new kind is met. No kernel uses atomic additions, so results are the same in every run.
"""

from .by_triton import TritonBackend

BACKEND = TritonBackend()

__all__ = ["BACKEND", "TritonBackend"]
