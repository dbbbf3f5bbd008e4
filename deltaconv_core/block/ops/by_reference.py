"""The backend of the reference: its formulas in float32, to tell a fast path's fault from another's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from .backend import Size


class ReferenceBackend:
    """See `backend.Backend`."""

    name = "reference"

    def why_not(self, x: Tensor) -> str | None:
        return None

    def shrink(self, u: Tensor, scale: float, pooling: str) -> Tensor:
        return reference.shrunk(_exact(u), scale, pooling).to(u.dtype)

    def depthwise_gate(self, u: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
        v = reference.depthwise(_exact(u), _exact(weight), None if bias is None else _exact(bias))
        g = reference.gated(v, kind)
        return g if u.dtype == torch.float16 else g.to(u.dtype)

    def depthwise(self, u: Tensor, weight: Tensor) -> Tensor:
        return reference.depthwise(_exact(u), _exact(weight), None).to(u.dtype)

    def project(
        self, stages: Sequence[Tensor], weight: Tensor, bias: Tensor, grid: Size, merge: str
    ) -> Tensor:
        full = [reference.stretched(_exact(g), *grid) for g in stages]
        f = torch.cat(full, dim=3) if merge == "concat" else sum(full[1:], start=full[0])
        y = f.flatten(1, 2) @ _exact(weight).T + _exact(bias)
        return y if weight.dtype == torch.float16 else y.to(weight.dtype)


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
