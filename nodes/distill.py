"""ΔConv Distill: trains ΔConvBlocks to stand in for a MODEL's own self-attention."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from comfy_api.latest import io, ui

from ..deltaconv_core.distill.session import summary
from ..deltaconv_core.errors import DeltaConvError
from .host.distill import runs
from .host.distill.dataset import read_dataset
from .host.distill.joint_learning import distillation_of
from .host.distill.presets import chosen
from .host.distill.session import Distillation, loss_map
from .host.distill.widgets import Widgets, widget
from .host.report import Report, TellsAgain, tell
from .sockets import CATEGORY, LossMap, Weights, search_aliases

ALWAYS = ("preset", "layer_steps", "output_steps", "learning_rate", "run_name", "resume")
OPTIONAL = (
    "caption_dropout", "blocks", "kernel_sizes", "form", "batch_size", "accumulation", "precision",
    "optimizer", "ema", "checkpointing", "feature", "seed", "save_every", "preview_every",
)  # fmt: skip
"""The order stays: workflows keep the widgets' values by position."""


class Distill(TellsAgain):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeltaConvDistill",
            display_name="ΔConv Distill",
            category=CATEGORY,
            **search_aliases("train", "distillation", "ConvFusion"),
            description="Trains ΔConv blocks to do what a model's self-attention does. The model itself is "
            "the teacher; it stays as it is. The run is saved as it goes, in output/deltaconv_runs, and "
            "resumes where it stopped.",
            is_input_list=True,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The teacher, a U-Net or PixArt; LoRAs on it are part of it. Or a FLUX, Z-Image, "
                    "... with joint mixers on it (ΔConv Convert Model): they learn further.",
                ),
                io.Latent.Input(
                    "latents",
                    tooltip="Pictures to learn from, encoded with the model's VAE: a batch, or the list that "
                    "Make Training Dataset gives. Sizes may be mixed.",
                ),
                io.Conditioning.Input(
                    "positive", tooltip="Their captions: one for each picture, or one for all."
                ),
                *map(widget, ALWAYS),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="An empty caption, which takes the place of a picture's own now and then, so "
                    "that guidance (cfg) works. Not connected: captions are never dropped.",
                ),
                *(widget(name, optional=True) for name in OPTIONAL),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The model with the blocks, ready to sample from."
                ),
                Weights.Output(display_name="deltaconv", tooltip="The blocks, for ΔConv Save Weights."),
                LossMap.Output(
                    display_name="loss_map",
                    tooltip="The loss at each step, relative to its phase's first, for Plot Loss Graph.",
                ),
                io.Int.Output(display_name="steps", tooltip="Steps done, those before a pause included."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, resume: Any) -> bool | str:
        try:
            for run in resume or ():  # a list; None where it is linked
                if run not in (None, runs.NEW):
                    runs.check_run(run)
        except DeltaConvError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, model: Any, latents: Any, positive: Any, negative: Any = None, **lists: Any
    ) -> io.NodeOutput:
        teacher = model[0]
        widgets = Widgets.read(lists)
        job = replace(widgets, **asdict(chosen(widgets, widgets.preset, teacher.load_device)))
        distillation = distillation_of(teacher, read_dataset(teacher, latents, positive, negative), job)
        known = (
            runs.finished(job.run_name, distillation.settings, distillation.new_notes)
            if job.resume == runs.NEW
            else None
        )
        folder = runs.open_run(job.resume, job.run_name)
        if known:
            folder.take_over(known)
        plan = _plan(distillation)
        tell(Report([plan]), cls.hidden)
        checkpoint, result = distillation.run(folder, cls.hidden)
        patched, report = distillation.patched(checkpoint, cls.hidden)
        done = f"{result.step} of {job.steps} steps of {folder.path.name}."
        if known:
            done += f" {known.path.name} was finished with the same settings and data, and is taken over."
        early = [f"training ended early: {result.stopped}"] if result.stopped else []
        warnings = [*early, *distillation.dataset.warnings, *report.warnings]
        text = tell(Report([done], warnings, [*report.lines, plan]), cls.hidden)
        return io.NodeOutput(patched, checkpoint, loss_map(result.rows), result.step, ui=ui.PreviewText(text))


def _plan(distillation: Distillation) -> str:
    """What is trained and how; for a preset, what it set."""
    job, (blocks, _) = distillation.job, distillation.memory
    return (
        f"{summary(distillation.specs)} learn from {distillation.dataset.description}; {job.preset}: batches "
        f"of {job.batch_size}, {job.accumulation} to a step, {job.precision}, {job.optimizer}, average "
        f"{job.ema:g}. Beside the model, their training keeps {blocks / 2**20:.3g} MiB, and each batch "
        "needs some for a while."
    )
