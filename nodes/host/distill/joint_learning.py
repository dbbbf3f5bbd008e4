"""Joint mixers that learn, on a loaded MODEL of text and image together."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ....deltaconv_core.distill import Tap, Taps, session
from ....deltaconv_core.distill.replaced import replaced
from ....deltaconv_core.errors import DeltaConvError
from ....deltaconv_core.mixers.joint import JointLayout
from ....deltaconv_core.mixers.shared import shared_mixer
from ....deltaconv_core.sites import select
from ....deltaconv_core.sites.choose_specs import AUTO, LEAN
from ....deltaconv_core.sites.sampling_range import SamplingRange
from ....deltaconv_core.weights.checkpoint import JOINT_KIND, Checkpoint
from ..model.attend import Forward, Usual, with_usual
from ..model.joint import JointSite, JointSites, Tokens, find_joint_sites
from ..model.sites import network_of
from ..patch.applied import blocks_on
from ..patch.joint_mixers import JointPatch, apply_joint, layout_of
from ..report import Report, show
from .dataset import Dataset
from .network import LoadedModel
from .session import Distillation
from .widgets import Widgets


@dataclass(frozen=True, eq=False)
class JointArguments:
    """What an attention was given: the arguments of `JointMixer.image`, but q is of all queries."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: JointLayout
    mask: Tensor | None


class JointTap(Tap):
    """Beside one attention of text and image; it observes the answers to the image's queries alone.

    Args:
        site: its id.
        own: the JointMixer, which is called with (JointArguments, grid) as `mixer`.
    """

    def __init__(self, site: str, own: Any) -> None:
        self.site = site
        self.own = own
        self.mixing = False
        self.observe = None

    def mixer(self, given: Any, grid: tuple[int, int]) -> Tensor:
        """(B, heads, H * W, d)."""
        image: Tensor = self.own.image(
            given.q[:, :, given.layout.image], given.k, given.v, given.layout, given.mask
        )
        return image

    def answer(self, given: JointArguments, usual: Usual) -> Tensor:
        """(B, heads, N, d), and what observes is told."""
        if self.mixing:
            answer: Tensor = self.own(given.q, given.k, given.v, given.layout, given.mask, usual)
        else:
            answer = usual(given.q, given.k, given.v, given.mask)
        if self.observe is not None:
            seen: Any = given
            self.observe(self.site, seen, given.layout.grid, answer[:, :, given.layout.image])
        return answer


class JointNetwork(LoadedModel):
    """A loaded MODEL with joint attentions.

    Args:
        model: ModelPatcher.
        found: its joint attentions.
    """

    def __init__(self, model: ModelPatcher, found: JointSites) -> None:
        super().__init__(model)
        self.found = found
        self.tokens: Tokens | None = None

    def clean(self, noisy: Tensor, sigma: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        self.tokens = self.found.tokens(noisy)
        return super().clean(noisy, sigma, conditions)

    @contextmanager
    def tapping(self, mixers: Mapping[str, torch.nn.Module]) -> Iterator[Taps]:
        """Inside, the joint mixers stand beside the attentions."""
        taps = {id: JointTap(id, mixer) for id, mixer in mixers.items()}
        blocks = {site.path: comfy.utils.get_attr(self.base, site.path) for site in self.found.sites}
        with replaced(
            (blocks[site.path], partial(self._run, site, blocks[site.path].forward, taps))
            for site in self.found.sites
        ):
            yield Taps(taps)

    def _run(
        self, site: JointSite, forward: Forward, taps: Mapping[str, JointTap], *args: Any, **call: Any
    ) -> Any:
        """The forward of a block whose attentions the taps answer."""
        tokens = self.tokens
        assert tokens is not None

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, usual: Usual) -> Tensor | None:
            id = site.id_of(q.shape[2], tokens)
            layout = layout_of(site, tokens, (q, k, mask), args, call)
            if id not in taps:
                return None
            if isinstance(layout, str):
                raise DeltaConvError(
                    f"no mixer can learn the attention at {id}, since {layout}; leave it out with `blocks`"
                )
            return taps[id].answer(JointArguments(q, k, v, layout, mask), usual)

        return with_usual(forward, attend)(*args, **call)


def distillation_of(model: ModelPatcher, dataset: Dataset, job: Widgets) -> Distillation:
    """A distillation of the kind that suits the MODEL; arguments and errors as for `Distillation`."""
    joint = find_joint_sites(network_of(model)) is not None
    return (JointDistillation if joint else Distillation)(model, dataset, job)


class JointDistillation(Distillation):
    """One of the joint mixers that are on a MODEL of text and image together.

    Their kernels and gains learn, each mixer by itself, what the attention in its place answers to the
    image's queries. Mixers that `blocks` leaves out stay as they are.
    """

    joint: JointSites
    patch: JointPatch

    def _find(self, model: ModelPatcher) -> list[str]:
        joint, patch, job = find_joint_sites(network_of(model)), blocks_on(model), self.job
        assert joint is not None
        if not isinstance(patch, JointPatch) or patch.checkpoint.mixer != JOINT_KIND:
            raise DeltaConvError(
                f"this MODEL is {joint.architecture}, whose attention is of text and image together. No "
                "ΔConv block can learn that, only joint mixers that are on the MODEL already: put ΔConv "
                "Convert Model before ΔConv Distill"
            )
        if job.output_steps:
            raise DeltaConvError(
                "joint mixers learn one by one, in the first phase; for the second, the model's own output, "
                f"there is no training yet: set output_steps to 0, got {job.output_steps}"
            )
        if (job.kernel_sizes, job.form) != (AUTO, LEAN):
            raise DeltaConvError(
                f"joint mixers keep the shape that they were made with: set kernel_sizes to {AUTO!r} and "
                f"form to {LEAN!r}, got {job.kernel_sizes!r} and {job.form!r}"
            )
        self.joint, self.patch = joint, patch
        self.specs = {id: patch.checkpoint.blocks[id].spec for id in select(job.blocks, patch.chosen)}
        return [site.path for site in joint.sites]

    def _start_notes(self) -> dict[str, str]:
        parts = [
            parameter.float().cpu().numpy().tobytes().hex()
            for id in self.specs
            for parameter in self.patch.checkpoint.blocks[id].parameters()
        ]
        return {"start": session.fingerprint(parts)}

    def _network(self, clone: ModelPatcher) -> LoadedModel:
        return JointNetwork(clone, self.joint)

    def _start(self, network: LoadedModel) -> dict[str, Any]:
        mixers = {id: copy.deepcopy(shared_mixer(self.patch.checkpoint.blocks[id])) for id in self.specs}
        return {id: mixer.float().to(network.device).requires_grad_() for id, mixer in mixers.items()}

    def _checkpoint(self, blocks: dict[str, Any], metadata: dict[str, str]) -> Checkpoint:
        before = self.patch.checkpoint
        sizes = {name: text for name, text in before.metadata.items() if name == "sizes"}
        return replace(before, blocks={**before.blocks, **blocks}, metadata=metadata | sizes)

    def patched(self, checkpoint: Checkpoint, hidden: io.HiddenHolder | None) -> tuple[ModelPatcher, Report]:
        chosen = ",".join(self.patch.chosen)
        tells = partial(show, hidden=hidden)
        return apply_joint(self.model, self.joint, checkpoint, chosen, SamplingRange(), tells)
