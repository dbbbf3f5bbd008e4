"""Fitting joint mixers to a model's attention of text and image, as `hybrid` fits those among tokens of an
image: one pass while it samples, and no gradient step.

What the image's queries see of text, references and other exact keys is the mixer's already, in the softmax
that it has with the landmarks; it takes no part in the fit. The sums do not know of what size an image was,
so pictures of several sizes are fitted at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..mixers.hybrid.features import count
from ..mixers.joint import JointLayout, JointMixer, JointSpec
from ..mixers.joint.flops import joint_flops
from ..mixers.joint.joint_features import joint_features, unpack_joint
from ..mixers.joint.module import attention
from ..mixers.joint.place import four_dimensional
from .hybrid import FEATURE_BYTES, HybridFit
from .hybrid_sums import add_queries
from .order import generator


class JointFit(HybridFit):
    """Fits any number of candidate mixers to each joint attention of a model that samples pictures.

    As `HybridFit`, with `JointSpec`s for candidates. `grids` has the largest image that was seen at a site.
    """

    @torch.no_grad()
    def see(self, site: str, q: Tensor, k: Tensor, v: Tensor, grid: Any, mask: Tensor | None = None) -> None:
        """One call of an attention.

        Args:
            site: its id.
            q, k, v, mask: as `JointMixer.forward` takes them.
            grid: the JointLayout.
        """
        if site not in self.candidates:
            return
        layout: JointLayout = grid
        call = self._calls[site]
        self._calls[site] += 1
        before = self.grids.get(site, (0, 0))
        self.grids[site] = max(before, layout.grid, key=lambda sides: sides[0] * sides[1])
        random = generator(self.settings.seed, f"{site} {call}", self.number)
        rows = torch.randperm(layout.tokens, generator=random)[: self.settings.rows].to(q.device)
        dtype = torch.promote_types(q.dtype, torch.float32)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        if mask is not None:
            mask = four_dimensional(mask if mask.dtype == torch.bool else mask.to(dtype))
        asked = mask if mask is None or mask.shape[2] == 1 else mask[:, :, layout.image][:, :, rows]
        answers = attention(q[:, :, layout.image][:, :, rows], k, v, asked)
        held_out = self.number % self.settings.held_out == self.settings.held_out - 1
        for spec, both in zip(self.candidates[site], self._of(site, q.device), strict=True):
            # Keys and values of a window exist for each query, in float32.
            step = max(1, FEATURE_BYTES // (8 * len(q) * spec.inner * (count(spec) + spec.window**2)))
            for start in range(0, len(rows), step):
                some = slice(start, start + step)
                x, exact = joint_features(spec, q, k, v, layout, mask, rows[some])
                add_queries(both[held_out], spec, x, answers[:, :, some], exact)

    def _mixer(self, spec: JointSpec, w: Tensor) -> JointMixer:
        return unpack_joint(spec, w)

    def flops(self, site: str, spec: JointSpec | None) -> float:
        """Operations of a mixer, or of the attention (None), among the image's tokens alone."""
        return joint_flops(spec, self.grids[site], 0, self.candidates[site][0].inner)
