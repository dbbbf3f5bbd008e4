"""ΔConv Convert Model: mixers in place of a MODEL's self-attention, fitted in minutes, not trained."""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ..deltaconv_core.distill.conversion import QUALITY, SPEED, Wishes
from .host.distill.conversion import ConversionJob, convert
from .host.report import TellsAgain, tell
from .sockets import BLOCKS_TOOLTIP, CATEGORY, Weights


class ConvertModel(TellsAgain):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeltaConvConvertModel",
            display_name="ΔConv Convert Model",
            category=CATEGORY,
            description="Makes a model's self-attention cheaper without training and without weights from "
            "elsewhere: it samples a few pictures, fits mixers to what the attention does, and puts "
            "them in place where they are good and fast enough.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A U-Net (SD 1.x, SD 2.x, SDXL, ...), PixArt, or FLUX, Chroma, Z-Image, "
                    "Lumina 2, Qwen-Image, SD 3; LoRAs on it act as before.",
                ),
                io.Conditioning.Input(
                    "positive", tooltip="What the calibration pictures show; something that you often draw."
                ),
                io.Latent.Input(
                    "latent",
                    tooltip="Its size is that of the pictures, and the one to be fast at; the content does "
                    "not count.",
                ),
                io.Combo.Input(
                    "budget",
                    options=[QUALITY, SPEED],
                    default=QUALITY,
                    tooltip="'quality': as fast as possible with errors of at most max_error. 'speed': the "
                    "least error at which self-attention takes max_time of its time.",
                ),
                io.Float.Input(
                    "max_error",
                    default=0.05,
                    min=0.001,
                    max=1.0,
                    step=0.001,
                    tooltip="For 'quality': the largest error of a layer, as a part of what attention "
                    "answers. Layers in which no mixer is that good stay attention.",
                ),
                io.Float.Input(
                    "max_time",
                    default=0.5,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="For 'speed': the part of its time that all self-attention may take together.",
                ),
                io.Int.Input(
                    "pictures",
                    default=8,
                    min=4,
                    max=1000,
                    tooltip="Calibration pictures. One in four is held out, to measure the errors.",
                ),
                io.Int.Input(
                    "steps", default=4, min=1, max=1000, tooltip="Sampling steps (Euler) of each of them."
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="Connected: pictures are sampled with guidance (cfg 4), as you probably will. "
                    "Not connected: without, as for turbo and lightning models.",
                ),
                io.String.Input(
                    "blocks",
                    default="all",
                    optional=True,
                    tooltip=f"What may be replaced: {BLOCKS_TOOLTIP}",
                ),
                io.Int.Input(
                    "calibration_seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    optional=True,
                    tooltip="Of the pictures' noise. Not called 'seed', which ComfyUI's frontend would "
                    "change after each run, so that the model would be converted again.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The converted model, ready to sample from."),
                Weights.Output(
                    display_name="deltaconv",
                    tooltip="The mixers, for ΔConv Save Weights: a small file that fits this model and its "
                    "fine-tunes.",
                ),
                io.String.Output(
                    display_name="report", tooltip="What was replaced by what, and what that saves."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: Any,
        latent: dict[str, Any],
        budget: str,
        max_error: float,
        max_time: float,
        pictures: int,
        steps: int,
        negative: Any = None,
        blocks: str = "all",
        calibration_seed: int = 0,
    ) -> io.NodeOutput:
        limit = max_error if budget == QUALITY else max_time
        job = ConversionJob(Wishes(budget, limit, pictures, calibration_seed), steps, blocks)
        done = convert(model, positive, negative, latent, job, cls.hidden)
        tell(done.report, cls.hidden)
        return io.NodeOutput(done.model, done.checkpoint, done.table, ui=ui.PreviewText(done.table))
