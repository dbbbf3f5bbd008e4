"""ΔConvBlock: the convolutional stand-in for one self-attention layer.

Dong et al., "Can We Achieve Efficient Diffusion without Self-Attention? Distilling Self-Attention into
Convolutions", ICCV 2025, arXiv 2504.21292, section 4. Parameter names follow the authors' release; kernels
are stored as Conv2d weights (channels, 1, K, K). Unlike in the release, a stage never shrinks to zero rows or
columns, and float16 does not overflow. `reference.py` is the specification of this fast path.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import DeltaConvError
from . import ops
from .spec import BlockSpec

START_STD = 0.02  # spread of a fresh block's output for inputs of unit variance
HALF_OR_MORE = (torch.float16, torch.bfloat16, torch.float32)  # what blocks are stored in to compute with


class Stage(nn.Module):
    """The weights of one pyramid stage: a depth-wise convolution on `inter` channels."""

    def __init__(self, spec: BlockSpec, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.conv_spatial: nn.Conv2d = operations.Conv2d(
            spec.inter,
            spec.inter,
            spec.kernel_size,
            padding=spec.kernel_size // 2,
            groups=spec.inter,
            bias=spec.depthwise_bias,
            **factory,
        )


class DeltaConvBlock(nn.Module):
    """Mixes tokens of an H x W grid by gated depth-wise convolutions at several scales plus a global mean.

    Args:
        spec: what the block is made of.
        device, dtype: of the weights.
        operations: namespace with `Linear` and `Conv2d`; a host passes its own castable layers. Weights are
            initialized only with `torch.nn`; with any other namespace load a state dict or call
            `reset_parameters`.

    Example:
        >>> block = DeltaConvBlock(BlockSpec(dim=64, kernel_size=7))
        >>> block(torch.randn(2, 15 * 20, 64), grid=(15, 20)).shape
        torch.Size([2, 300, 64])
    """

    kind = "deltaconv"

    def __init__(
        self,
        spec: BlockSpec,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        operations: Any = nn,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.spec = spec
        self.conv_up: nn.Linear = operations.Linear(spec.dim, spec.inter, **factory)
        self.gates = nn.ModuleList(Stage(spec, operations, **factory) for _ in spec.scales)
        self.conv_out: nn.Linear = operations.Linear(spec.merged, spec.dim, **factory)
        self.conv_pool: nn.Linear = operations.Linear(spec.dim, spec.dim, **factory)
        if operations is nn and not self.conv_up.weight.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A start for distillation: random weights that keep unit variance inside, and a small output.

        The output's spread is about START_STD for unit-variance tokens, whatever the gate: a fresh student
        neither disturbs the network nor starves any weight of gradient.
        """
        spec = self.spec
        _normal(self.conv_up, 1 / math.sqrt(spec.dim))
        for stage in self.stages():
            _normal(stage.conv_spatial, 1 / spec.kernel_size)
        # With unit-variance halves a product has variance 1, and a * sigmoid(b) about 0.3.
        factor = {"simple": math.sqrt(spec.inter / 2), "sigmoid": 0.55, "scaled": 1 / math.sqrt(spec.inter)}
        spread = factor[spec.gate] * math.sqrt(1 if spec.merge == "concat" else len(spec.scales))
        _normal(self.conv_out, START_STD / (spread * math.sqrt(spec.merged)))
        _normal(self.conv_pool, START_STD / math.sqrt(spec.dim))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Mixes the tokens.

        Args:
            x: (B, H * W, C) floating point, row by row; any strides, B may be 0.
            grid: (H, W), both at least 1.

        Returns:
            (B, H * W, C) in x's dtype. The computation runs in that dtype too (under autocast in autocast's),
            whatever the weights are stored in, except for float16: its gate is float32, and on a CPU all of
            it (not under autocast).

        Raises:
            DeltaConvError: tokens that do not fit the grid or the block.
        """
        self._check(x, grid)
        if not len(x):
            return x.clone()
        return self._mix(x.to(ops.compute_dtype(x)), (int(grid[0]), int(grid[1]))).to(x.dtype)

    def _mix(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        u = ops.call_layer(self.conv_up, x).reshape(len(x), *grid, -1).contiguous()  # (B, H, W, inter)
        # Two steps, in float32 at least: faster than one, and no less exact.
        columns = x.reshape(len(x), *grid, -1).mean(dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
        mean = columns.mean(dim=1, keepdim=True).to(x.dtype)
        everywhere = ops.call_layer(self.conv_pool, mean).to(u.dtype)  # (B, 1, C)
        if not all(map(ops.gives_weights, (self.conv_out, *(s.conv_spatial for s in self.stages())))):
            return self._mix_by_layers(u, everywhere)
        backend = ops.backend_for(u)
        with ops.no_autocast(u):  # u has its dtype, and all that follows has u's
            stages = self._all_stages(backend, u)
            del u  # its memory may serve the output

            def project(weight: Tensor, bias: Tensor | None) -> Tensor:
                # A sum image by image would round the gradient of the bias twice.
                if bias is None or torch.is_grad_enabled():
                    y = backend.project(stages, weight, everywhere, grid, self.spec.merge)
                    return y if bias is None else y + bias
                return backend.project(stages, weight, everywhere + bias, grid, self.spec.merge)

            return ops.with_weights(self.conv_out, everywhere, project)

    def _all_stages(self, backend: ops.Backend, u: Tensor) -> list[Tensor]:
        pairs = list(zip(self.stages(), self.spec.scales, strict=True))
        order = list(range(len(pairs)))
        if not torch.is_grad_enabled():
            # Smaller stages first: the memory that they leave behind serves the largest one.
            order.sort(key=self.spec.scales.__getitem__)
        made = {i: self._stage(backend, pairs[i][0], u, pairs[i][1]) for i in order}
        stages = [made[i] for i in sorted(order)]
        if self.spec.context:
            context = ops.context(u.permute(0, 3, 1, 2), self.spec.gate).permute(0, 2, 3, 1)
            if self.spec.merge == "sum" and 1 in self.spec.scales:
                # Here, so that no backend multiplies two stages of the full size.
                full = self.spec.scales.index(1)
                stages[full] = stages[full] + context
            else:
                stages.append(context)
        return stages

    def _stage(self, backend: ops.Backend, stage: Stage, u: Tensor, scale: float) -> Tensor:
        z = u if scale == 1 else backend.shrink(u, scale, self.spec.pooling)

        def convolve(weight: Tensor, bias: Tensor | None) -> Tensor:
            return backend.depthwise_gate(z, weight, bias, self.spec.gate)

        return ops.with_weights(stage.conv_spatial, z, convolve)

    def _mix_by_layers(self, u: Tensor, everywhere: Tensor) -> Tensor:
        """The rest of the block by calling each layer, for layers that do more than their weights say."""
        spec, grid = self.spec, (u.shape[1], u.shape[2])
        u = u.permute(0, 3, 1, 2)  # (B, inter, H, W) over channels-last memory
        stages = []
        for stage, scale in zip(self.stages(), spec.scales, strict=True):
            z = u if scale == 1 else ops.shrink(u, scale, spec.pooling)
            g = ops.gate(ops.call_layer(stage.conv_spatial, z), spec.gate)
            stages.append(g if scale == 1 else ops.enlarge(g, grid))
        if spec.context:
            stages.append(ops.context(u, spec.gate))
        f = ops.merge(stages, spec.merge).permute(0, 2, 3, 1).flatten(1, 2)  # (B, N, merged)
        if u.dtype == torch.float16:
            return ops.project_half(self.conv_out, f, everywhere)
        return ops.call_layer(self.conv_out, f) + everywhere

    def stages(self) -> Iterable[Stage]:
        """The pyramid's stages, as their types are."""
        return cast(Iterable[Stage], self.gates)

    def _check(self, x: Tensor, grid: tuple[int, int]) -> None:
        height, width = grid
        if height < 1 or width < 1:
            raise DeltaConvError(f"expected a grid of at least 1 x 1, got {height} x {width}")
        if x.ndim != 3 or x.shape[2] != self.spec.dim:
            raise DeltaConvError(f"expected tokens of shape (B, H*W, {self.spec.dim}), got {tuple(x.shape)}")
        if x.shape[1] != height * width:
            raise DeltaConvError(
                f"expected {height} x {width} = {height * width} tokens, got {x.shape[1]}; something before "
                "this block merges or tiles tokens (ToMe, HyperTile), or the grid belongs to another layer"
            )
        if not x.is_floating_point():
            raise DeltaConvError(f"expected floating point tokens, got {x.dtype}")

    def extra_repr(self) -> str:
        """The spec, for printing."""
        return str(self.spec)


def shared_copy(
    source: Any,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    operations: Any = nn,
) -> DeltaConvBlock:
    """The same block once more, for inference; its weights are shared as far as device and dtype allow.

    Args:
        source: a DeltaConvBlock, also one of this package loaded under another name.
        device, dtype: of the weights; None keeps what they have.
        operations: see `DeltaConvBlock`.
    """
    # A host may run in inference mode. Weights made there could never be part of a graph trained on top.
    with torch.inference_mode(False), torch.no_grad():
        block = DeltaConvBlock(source.spec, device="meta", operations=operations)
        weights = {
            name: tensor.to(device, dtype or tensor.dtype, copy=tensor.is_inference())
            for name, tensor in source.state_dict().items()
        }
        block.load_state_dict(weights, assign=True)
        return block.requires_grad_(False).eval()


def _normal(layer: nn.Linear | nn.Conv2d, std: float) -> None:
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
