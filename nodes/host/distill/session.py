"""One distillation in ComfyUI, from what came in through the node's sockets to trained blocks."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ....deltaconv_core.distill import Result, Row, RunFolder, check_same_run, distill, session
from ....deltaconv_core.distill.settings import END_TO_END, LAYER_WISE
from ....deltaconv_core.errors import DeltaConvError
from ....deltaconv_core.sites import select
from ....deltaconv_core.sites.choose_specs import block_specs
from ....deltaconv_core.sites.sampling_range import SamplingRange
from ....deltaconv_core.util.devices import SHORT_DTYPES
from ....deltaconv_core.weights.checkpoint import Checkpoint
from ..model.borrow import borrowed_model
from ..model.sites import Sites, find_sites
from ..model.standing import check_reach
from ..patch.applied import without_blocks
from ..patch.apply import PatchSettings, apply_checkpoint
from ..report import Report, show
from .dataset import Batches, Dataset
from .network import ComfyNetwork, LoadedModel
from .presets import activation_bytes, training_bytes
from .preview import Preview
from .runs import runs_folder
from .widgets import Widgets

log = logging.getLogger(__name__)

DISTILL_REMEDY = "distil the MODEL without that node"
PHASES = {
    LAYER_WISE: "phase 1 of 2: each block learns its own attention's output",
    END_TO_END: "phase 2 of 2: all blocks learn to keep the model's output",
}
SHOW_EVERY = 1.0
"""Seconds between updates of the text under the node."""
DROPPED = {"captions_dropped": "one by one"}
"""Noted with a run since captions are dropped picture by picture; before, a batch lost all of its or none."""


class Distillation:
    """A MODEL, the data and the job, checked; `run` trains.

    Args:
        model: ModelPatcher, the teacher; ΔConv that may be on it is left out.
        dataset: what to learn from.
        job: what the user chose, with the preset and the precision decided.

    Raises:
        DeltaConvError: they do not go together.
    """

    def __init__(self, model: ModelPatcher, dataset: Dataset, job: Widgets) -> None:
        self.model = without_blocks(model)
        self.dataset = dataset
        self.job = job
        self.settings = job.settings(job.precision)
        self.specs: dict[str, Any] = {}
        paths = self._find(model)
        check_reach(self.model, paths, DISTILL_REMEDY)
        self.dropout = job.caption_dropout if dataset.empty is not None else 0.0
        self.notes = session.notes(
            _fingerprint(self.model),
            self.specs,
            job.batch_size,
            self.dropout,
            data=dataset.fingerprint,
            **self._start_notes(),
        )

    @property
    def new_notes(self) -> dict[str, str]:
        """Those of a run that starts now."""
        return self.notes | DROPPED

    @property
    def memory(self) -> tuple[int, int]:
        """Bytes that the blocks' training and one batch need beside the MODEL, by arithmetic."""
        shape = [self.job.batch_size, *self.dataset.largest[1:]]
        return training_bytes(self.specs, self.settings), activation_bytes(self.model, shape, self.settings)

    def run(self, folder: RunFolder, hidden: io.HiddenHolder | None) -> tuple[Checkpoint, Result]:
        """Trains; afterwards the MODEL is as it was, whatever happens.

        Args:
            folder: of the run; one with a state is resumed.
            hidden: the node's hidden inputs, for the text under it.
        """
        try:
            by_batch = folder.exists and not DROPPED.keys() <= folder.values()["notes"].keys()
            notes = self.notes if by_batch else self.new_notes
            check_same_run(folder, self.settings, notes)
            with borrowed_model(self.model, SHORT_DTYPES[self.settings.precision], sum(self.memory)) as clone:
                network = self._network(clone)
                mixers = self._start(network)
                progress = _Progress(self._preview(network, mixers), self.job, hidden)
                size, seed = self.job.batch_size, self.settings.seed
                batches = Batches(network, self.dataset, size, seed, self.dropout, by_batch=by_batch)
                tapping = network.tapping(mixers)
                result = distill(
                    network, mixers, batches, self.settings, folder, progress, notes, tapping=tapping
                )
                blocks = {id: block.requires_grad_(False).cpu() for id, block in mixers.items()}
        except BaseException as error:
            _say_how_to_resume(folder, error, hidden)
            raise
        if not result.step:
            raise DeltaConvError(f"nothing was learned: {result.stopped}")
        return self._checkpoint(blocks, self._metadata(result)), result

    def patched(self, checkpoint: Checkpoint, hidden: io.HiddenHolder | None) -> tuple[ModelPatcher, Report]:
        """The MODEL with the blocks in place of its attention, and what to report."""
        settings = PatchSettings(",".join(self.specs), SamplingRange(), None)
        return apply_checkpoint(self.model, self.found, checkpoint, settings)

    def _find(self, model: ModelPatcher) -> list[str]:
        """Finds what shall learn where, by site id, and returns the paths of the modules there."""
        self.found: Sites = find_sites(self.model)
        chosen = select(self.job.blocks, self.found.sites)
        self.specs = block_specs(self.found.shape, chosen, self.job.kernel_sizes, self.job.form)
        self.sites = {id: self.found.sites[id] for id in self.specs}
        return [site.path for site in self.sites.values()]

    def _start_notes(self) -> dict[str, str]:
        """What else must be the same when the run is resumed."""
        return {}

    def _network(self, clone: ModelPatcher) -> LoadedModel:
        return ComfyNetwork(clone, self.sites)

    def _checkpoint(self, blocks: dict[str, Any], metadata: dict[str, str]) -> Checkpoint:
        return Checkpoint(self.found.architecture, blocks, {}, metadata)

    def _start(self, network: LoadedModel) -> dict[str, Any]:
        """The blocks to train, on the network's device."""

        def attention(id: str) -> torch.nn.Module:
            comfy.model_management.throw_exception_if_processing_interrupted()
            return network.attentions[id]  # takes and gives float32, as its layers cast

        return session.start_blocks(self.specs, self.settings.seed, network.device, attention)

    def _preview(self, network: LoadedModel, mixers: Mapping[str, torch.nn.Module]) -> Preview | None:
        if not self.job.preview_every:
            return None
        dtype = SHORT_DTYPES[self.settings.precision]
        preview = Preview(network, mixers, self.dataset, self.settings.seed, dtype)
        return preview if preview.possible else None

    def _metadata(self, result: Result) -> dict[str, str]:
        training = self.settings.to_dict()
        training |= {"batch_size": self.job.batch_size, "caption_dropout": self.dropout}
        teacher, data = type(self.model.model).__name__, self.dataset.description
        source, steps = "distilled with ComfyUI-DeltaConv", str(result.step)
        return session.metadata(teacher, training, data, source, self.notes, steps=steps)


def loss_map(rows: Iterable[Row]) -> dict[str, list[float]]:
    """ComfyUI's LOSS_MAP of a run: each phase's loss as a multiple of what it was in the phase's first step.

    The phases' losses differ by orders of magnitude; as they are, one of them would be a flat line in a plot.

    ComfyUI's Plot Loss Graph divides by the difference of the largest and the smallest loss. Where there is
    none, as after a single step, the smallest step that a number can make is added as a last point. Steps
    that loss scaling skipped, whose loss may be no number, are left out; a run without a log gets a flat one.
    """
    first: dict[str, float] = {}
    sound = [row for row in rows if math.isfinite(row.loss)]
    losses = [row.loss / (first.setdefault(row.phase, row.loss) or 1.0) for row in sound] or [1.0]
    if len(set(losses)) < 2:
        losses.append(math.nextafter(losses[-1], math.inf))
    return {"loss": losses}


class _Progress:
    """Called after every step: the bar, the text under the node, previews, and the user's wish to stop."""

    def __init__(self, preview: Preview | None, job: Widgets, hidden: io.HiddenHolder | None) -> None:
        self.preview = preview
        self.job = job
        self.hidden = hidden
        self.bar = comfy.utils.ProgressBar(job.steps)
        self.shown = 0.0
        self.phase, self.began = "", (0, 0.0)

    def __call__(self, row: Row) -> None:
        steps = self.job.steps
        due = row.step % (self.job.preview_every or steps) == 0 or row.step == steps
        picture = self._draw() if due else None
        self.bar.update_absolute(row.step, steps, picture and ("JPEG", picture, 1024))
        if time.monotonic() - self.shown >= SHOW_EVERY or row.step == steps:
            losses = ", ".join(f"{name} {value:.4g}" for name, value in row.losses.items())
            show(
                f"step {row.step} of {steps}{self._left(row)}\n{PHASES[row.phase]}\nloss: {losses}",
                self.hidden,
            )
            self.shown = time.monotonic()
        comfy.model_management.throw_exception_if_processing_interrupted()

    def _left(self, row: Row) -> str:
        """How long the rest of the phase takes, and whether another one follows; times differ by phase."""
        now = time.monotonic()
        if row.phase != self.phase:
            self.phase, self.began = row.phase, (row.step, now)
        step, then = self.began
        job = self.job
        left = (job.layer_steps if row.phase == LAYER_WISE else job.steps) - row.step
        if row.step == step or not left:
            return ""
        minutes = (now - then) / (row.step - step) * left / 60
        more = ", then phase 2" if row.phase == LAYER_WISE and job.output_steps else ""
        return f", {'less than a minute' if minutes < 1 else f'about {minutes:.0f} min'} left{more}"

    def _draw(self) -> Any:
        """A preview; where memory is too short for one, there are none from now on."""
        try:
            return self.preview and self.preview()
        except comfy.model_management.OOM_EXCEPTION:
            log.warning("ΔConv distillation: too little memory for previews; it continues without them")
            self.preview = None
            comfy.model_management.soft_empty_cache()
            return None


def _say_how_to_resume(folder: RunFolder, error: BaseException, hidden: io.HiddenHolder | None) -> None:
    name = folder.path.relative_to(runs_folder()).as_posix()
    stopped = isinstance(error, comfy.model_management.InterruptProcessingException)
    what = "ΔConv distillation was stopped" if stopped else "ΔConv distillation failed"
    if folder.exists:
        how = f"To resume it, choose {name!r} in `resume`, and leave the rest as it is."
        text = f"{what}; the run is kept. {how}"
    else:
        text = f"{what} before its first step; there is nothing to keep."
        if folder.path.is_dir() and not any(folder.path.iterdir()):
            folder.path.rmdir()
    log.warning("%s", text)
    show(text, hidden)


def _fingerprint(model: ModelPatcher) -> str:
    """Differs for another base model, other patches (LoRAs) or strengths, or another kind of prediction or
    schedule: from the first values of every tensor."""
    weights = [
        f"{key} {_first(weight)} {[(p[0], p[2], _first(p[1])) for p in patches]}"
        for key, ((weight, _), *patches) in sorted(model.get_key_patches("diffusion_model.").items())
    ]
    sampling = model.get_model_object("model_sampling")
    kinds = [kind.__name__ for kind in type(sampling).__mro__]
    levels = getattr(sampling, "sigmas", torch.zeros(0)).tolist()
    return session.fingerprint([*weights, f"{kinds} {levels}"])


def _first(value: Any) -> Any:
    """The shape and first values of each tensor in a weight or patch; other things are passed over."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), session.first_values(value)
    if isinstance(value, (list, tuple)):
        return [_first(item) for item in value]
    return _first(value.weights) if hasattr(value, "weights") else None  # an adapter, as LoRAs are
