"""The local part of a mixer: static kernels on the values of what is near."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from ..block import ops


def local_part(
    v: Tensor, grid: tuple[int, int], kernels: Iterable[Tensor], scales: Sequence[float]
) -> Tensor:
    """Depth-wise convolutions of the values at each scale, enlarged and added up.

    Values that are views of tokens (B, H * W, heads * d), as projections make them, are not copied.

    Args:
        v: (B, heads, H * W, d), row by row.
        grid: (H, W).
        kernels: (heads or heads * d, 1, K, K), one for each scale; moved and cast to what v is.
        scales: as a spec has them.

    Returns:
        (B, heads, H * W, d).
    """
    batch, heads, _, d = v.shape
    image = v.transpose(1, 2).reshape(batch, *grid, heads * d)
    backend = ops.backend_for_convolution(image)
    y = None
    for kernel, scale in zip(kernels, scales, strict=True):
        weight = kernel.to(image.device, image.dtype).repeat_interleave(heads * d // len(kernel), dim=0)
        z = image if scale == 1 else backend.shrink(image, scale, "average")
        z = backend.depthwise(z, weight)
        if scale != 1:
            z = ops.enlarge(z.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)
        y = z if y is None else y + z
    assert y is not None
    return y.reshape(batch, -1, heads, d).transpose(1, 2)
