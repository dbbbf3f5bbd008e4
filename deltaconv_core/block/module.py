"""ΔConvBlock: the convolutional stand-in for one self-attention layer.

Dong et al., "Can We Achieve Efficient Diffusion without Self-Attention? Distilling Self-Attention into
Convolutions", ICCV 2025, arXiv 2504.21292, section 4. Parameter names follow the authors' code; kernels
are stored as Conv2d weights (channels, 1, K, K). Unlike in theirs, a stage never shrinks to zero rows or
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
from .steps import at_once, begin, call_layer

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
        spec, dtype, grid = self.spec, x.dtype, (int(grid[0]), int(grid[1]))
        x = x.to(ops.compute_dtype(x))
        convolutions = [stage.conv_spatial for stage in self.stages()]
        y = at_once(spec, [self.conv_up, self.conv_pool, *convolutions, self.conv_out], x, grid)
        if y is not None:
            return y.to(dtype)
        steps, u = begin(spec, self.conv_up, [*convolutions, self.conv_out], x, grid)
        everywhere = call_layer(self.conv_pool, _mean(x, grid)).to(u.dtype)  # (B, 1, C)
        with steps.scope(u):
            made = {}
            for i in self._order():
                made[i] = steps.stage(convolutions[i], u, spec.scales[i])
            stages = [made.pop(i) for i in range(len(made))]
            if spec.context:
                stages = steps.with_context(stages, u)
            del x, u  # their memory may serve the output
            y = steps.project(self.conv_out, stages, everywhere, grid)
        return y.to(dtype)

    def _order(self) -> list[int]:
        """In which the stages are made. Without gradients smaller ones come first: the memory that they leave
        behind serves the largest one."""
        order = list(range(len(self.spec.scales)))
        if not torch.is_grad_enabled():
            order.sort(key=self.spec.scales.__getitem__)
        return order

    def stages(self) -> Iterable[Stage]:
        """`gates`, typed."""
        return cast("Iterable[Stage]", self.gates)

    def _check(self, x: Tensor, grid: tuple[int, int]) -> None:
        height, width = grid
        if height < 1 or width < 1:
            raise DeltaConvError(f"expected a grid of at least 1 x 1, got {height} x {width}")
        if x.ndim != 3 or x.shape[2] != self.spec.dim:
            raise DeltaConvError(f"expected tokens of shape (B, H*W, {self.spec.dim}), got {tuple(x.shape)}")
        check_tokens(x, grid)
        if not x.is_floating_point():
            raise DeltaConvError(f"expected floating point tokens, got {x.dtype}")

    def extra_repr(self) -> str:
        """The spec, for printing."""
        return str(self.spec)


def check_tokens(x: Tensor, grid: tuple[int, int]) -> None:
    """Refuses tokens x (B, N, C) that do not fill the grid (H, W).

    Raises:
        DeltaConvError: N is not H * W.
    """
    height, width = grid
    if x.shape[1] != height * width:
        raise DeltaConvError(
            f"ΔConv expected {height} x {width} = {height * width} tokens, got {x.shape[1]}: something tiles "
            "or merges tokens before the self-attention. HyperTile and Token Merging (ToMe) do; take them "
            "off the model, or leave their sites out with `blocks`"
        )


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


def _mean(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """The mean token, (B, H * W, C) -> (B, 1, C).

    In two steps, in float32 at least: faster than one step, and no less exact.
    """
    columns = x.reshape(len(x), *grid, -1).mean(dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
    return columns.mean(dim=1, keepdim=True).to(x.dtype)


def _normal(layer: nn.Linear | nn.Conv2d, std: float) -> None:
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
