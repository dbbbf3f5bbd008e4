"""ΔConv Distill: trains ΔConvBlocks to stand in for a MODEL's own self-attention."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from typing import Any

from comfy_api.latest import io, ui

from ..deltaconv_core.distill import Settings
from ..deltaconv_core.distill.settings import FEATURES, OPTIMIZERS
from ..deltaconv_core.errors import DeltaConvError
from ..deltaconv_core.util.devices import SHORT_DTYPES
from .host.distill import runs
from .host.distill.dataset import read_dataset
from .host.distill.presets import CUSTOM, PRESETS, Preset, settled
from .host.distill.session import EVERYWHERE, Distillation, Job, loss_map
from .host.model.specs import AUTO, FORMS, LEAN
from .host.report import Report, tell
from .sockets import CATEGORY, LossMap, Weights

MEGABYTE = 1 << 20


class Distill(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeltaConvDistill",
            display_name="ΔConv Distill",
            category=CATEGORY,
            description="Trains ΔConv blocks to do what a model's self-attention does. The model itself is "
            "the teacher; it stays as it is. The run is saved as it goes, in output/deltaconv_runs, and goes "
            "on where it stopped.",
            is_input_list=True,
            inputs=[
                io.Model.Input(
                    "model", tooltip="The teacher, a U-Net or PixArt; LoRAs on it are part of it."
                ),
                io.Latent.Input(
                    "latents",
                    tooltip="Pictures to learn from, encoded with the model's VAE: a batch, or the list that "
                    "Make Training Dataset gives. Sizes may be mixed.",
                ),
                io.Conditioning.Input(
                    "positive", tooltip="Their captions: one for each picture, or one for all."
                ),
                io.Combo.Input(
                    "preset",
                    options=[CUSTOM, *PRESETS],
                    default="12 GB",
                    tooltip="Sets what has to do with memory for a graphics card of this size: batch size, "
                    "accumulation, precision, optimizer (8-bit where bitsandbytes is installed) and the "
                    "average of the weights. 'custom' takes the inputs of those names. Worked out by "
                    "arithmetic, not measured on such cards.",
                ),
                io.Int.Input(
                    "layer_steps",
                    default=500,
                    min=0,
                    max=1_000_000,
                    tooltip="First stage: every block learns its own attention's output. Quick and light.",
                ),
                io.Int.Input(
                    "output_steps",
                    default=500,
                    min=0,
                    max=1_000_000,
                    tooltip="Second stage: the blocks learn together to keep the model's output as it was.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=3e-4,
                    min=1e-7,
                    max=1.0,
                    step=1e-7,
                    tooltip="The highest of AdamW's; it rises at the start of a stage and falls at its end.",
                ),
                io.String.Input(
                    "run_name",
                    default="run",
                    tooltip="Name of a new run's folder in output/deltaconv_runs; a number is added, so no "
                    "run is ever overwritten.",
                ),
                io.Combo.Input(
                    "resume",
                    options=runs.choices(),
                    default=runs.NEW,
                    tooltip="A run to go on with, exactly as if it had not stopped; leave the other inputs "
                    "as they were (the numbers of steps may grow). The last changed run comes first.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="An empty caption, which takes the place of the real ones now and then, so that "
                    "guidance (cfg) works. Not connected: captions are never dropped.",
                ),
                io.Float.Input(
                    "caption_dropout",
                    default=0.15,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="The part of the pictures that get 'negative' in place of their captions, drawn "
                    "picture by picture.",
                ),
                io.String.Input(
                    "blocks",
                    default=EVERYWHERE,
                    optional=True,
                    tooltip="Which self-attentions are learned, as in ΔConv Patch Model; the others stay "
                    "attention. Example: all,-mid",
                ),
                io.String.Input(
                    "kernel_sizes",
                    default=AUTO,
                    optional=True,
                    tooltip="'auto': the authors' for models they published some for, like ones for others. "
                    'One odd number for all blocks, or JSON by site, such as {"down": 7, "mid_block": 5}. Or '
                    "the recommendation of ΔConv Attention Locality for this model, as JSON; layers that it "
                    "skips stay attention.",
                ),
                io.Combo.Input(
                    "form",
                    options=list(FORMS),
                    default=LEAN,
                    optional=True,
                    tooltip="What the blocks are made of. 'lean': fewer channels inside and a context stage, "
                    "less work than the authors' and learns more. 'released': as in the weights that the "
                    "authors published; only these can be converted to their form.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=1024,
                    optional=True,
                    tooltip="Pictures that run at once (preset 'custom').",
                ),
                io.Int.Input(
                    "accumulation",
                    default=1,
                    min=1,
                    max=1024,
                    optional=True,
                    tooltip="Batches whose gradients make one step (preset 'custom').",
                ),
                io.Combo.Input(
                    "precision",
                    options=[AUTO, *SHORT_DTYPES],
                    default=AUTO,
                    optional=True,
                    tooltip="What is computed in (preset 'custom'). auto: bf16, fp16 on cards without it, "
                    "fp32 on a CPU. The blocks' weights are fp32 while they learn.",
                ),
                io.Combo.Input(
                    "optimizer",
                    options=OPTIMIZERS,
                    default=OPTIMIZERS[0],
                    optional=True,
                    tooltip="adamw8bit needs the package bitsandbytes and a graphics card (preset 'custom').",
                ),
                io.Float.Input(
                    "ema",
                    default=0.995,
                    min=0.0,
                    max=0.99999,
                    step=0.00001,
                    optional=True,
                    tooltip="The result is a moving average of the weights, of which this part stays at each "
                    "step; 0 takes the last weights and saves a copy of the blocks (preset 'custom').",
                ),
                io.Boolean.Input(
                    "checkpointing",
                    default=True,
                    optional=True,
                    tooltip="Second stage: run the model's parts twice to need far less memory.",
                ),
                io.Combo.Input(
                    "feature",
                    options=FEATURES,
                    default=FEATURES[0],
                    optional=True,
                    tooltip="Second stage: besides the model's output, compare the blocks' output with "
                    "attention's (the paper), or the stream that it is added to (the authors' code).",
                ),
                io.Int.Input(
                    "training_seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    optional=True,
                    tooltip="Of the blocks, the noise and the order of the data. Not called 'seed', which "
                    "ComfyUI's frontend would change after each run.",
                ),
                io.Int.Input(
                    "save_every",
                    default=100,
                    min=1,
                    max=1_000_000,
                    optional=True,
                    tooltip="Steps between saved states; more steps than these cannot get lost. Stopping the "
                    "run saves too.",
                ),
                io.Int.Input(
                    "preview_every",
                    default=100,
                    min=0,
                    max=1_000_000,
                    optional=True,
                    tooltip="Steps between preview pictures: the teacher's left, the student's right, from "
                    "the first caption and the same noise. 0: none.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The model with the blocks, ready to sample from."
                ),
                Weights.Output(display_name="deltaconv", tooltip="The blocks, for ΔConv Save Weights."),
                LossMap.Output(
                    display_name="loss_map",
                    tooltip="The loss at each step, relative to its stage's first, for Plot Loss Graph.",
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
                    runs.check(run)
        except DeltaConvError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, model: Any, latents: Any, positive: Any, negative: Any = None, **lists: Any
    ) -> io.NodeOutput:
        teacher = model[0]
        values = _defaults() | {name: items[0] for name, items in lists.items()}
        preset = _preset(values, teacher.load_device)
        settings = Settings(
            accumulation=preset.accumulation,
            precision=preset.precision,
            optimizer=preset.optimizer,
            ema=preset.ema,
            seed=values["training_seed"],
            **{name: values[name] for name in STRAIGHT},
        )
        job = Job(
            settings,
            values["blocks"],
            values["kernel_sizes"],
            values["form"],
            preset.batch_size,
            values["caption_dropout"],
            values["preview_every"],
        )
        dataset = read_dataset(teacher, latents, positive, negative)
        distillation = Distillation(teacher, dataset, job)
        name, resume = values["run_name"], values["resume"]
        known = runs.finished(name, settings, distillation.new_notes) if resume == runs.NEW else None
        folder = runs.open_run(resume, name)
        if known:
            folder.take_over(known)
        plan = _plan(distillation, values["preset"])
        tell(Report([plan]), cls.hidden)
        checkpoint, result = distillation.run(folder, cls.hidden)
        patched, report = distillation.patched(checkpoint)
        done = f"{result.step} of {settings.steps} steps of {folder.path.name}. {plan}"
        if known:
            done += f" {known.path.name} was finished with the same settings and data, and is taken over."
        early = [f"training ended early: {result.stopped}"] if result.stopped else []
        text = tell(Report([done, *report.lines], [*report.warnings, *early]), cls.hidden)
        return io.NodeOutput(patched, checkpoint, loss_map(result.rows), result.step, ui=ui.PreviewText(text))


STRAIGHT = ("layer_steps", "output_steps", "learning_rate", "checkpointing", "feature", "save_every")
"""Inputs that are settings of the core under the same name."""


@cache
def _defaults() -> dict[str, Any]:
    """What a prompt through the API may leave out. Not at import: the schema looks for runs on the disk."""
    inputs = Distill.define_schema().inputs
    return {input.id: input.default for input in inputs if isinstance(input, io.WidgetInput)}


def _preset(values: dict[str, Any], device: Any) -> Preset:
    custom = Preset(**{field.name: values[field.name] for field in fields(Preset)})
    return settled(PRESETS.get(values["preset"], custom), device)


def _plan(distillation: Distillation, preset: str) -> str:
    """What is trained and how; for a preset, what it set."""
    job, settings = distillation.job, distillation.job.settings
    blocks, _ = distillation.memory
    parameters = sum(spec.num_parameters for spec in distillation.specs.values()) / 1e6
    return (
        f"{len(distillation.specs)} blocks ({parameters:.3g} M parameters) learn from "
        f"{distillation.dataset.description}; {preset}: batches of {job.batch_size}, {settings.accumulation} "
        f"to a step, {settings.precision}, {settings.optimizer}, average {settings.ema:g}. Beside the model, "
        f"their training keeps {blocks / MEGABYTE:.3g} MB, and each batch needs some for a while."
    )
