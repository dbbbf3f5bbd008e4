"""ΔConv Patch Model: self-attention of a MODEL replaced by trained ΔConvBlocks."""

from __future__ import annotations

from functools import partial
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ..deltaconv_core.errors import DeltaConvError
from ..deltaconv_core.sites.sampling_range import SamplingRange
from ..deltaconv_core.weights.checkpoint import Checkpoint
from .host.files import model_folder
from .host.files.choice import FileChoice
from .host.model.joint import find_joint_sites
from .host.model.sites import Sites, find_sites, network_of
from .host.patch.apply import PatchSettings, apply_checkpoint
from .host.patch.joint_mixers import apply_joint
from .host.report import show, tell, tell_again
from .sockets import ADVANCED, BLOCKS_TOOLTIP, CATEGORY, Weights, search_aliases

APPLY, LEAVE_OUT = "apply", "leave out"


class PatchModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeltaConvPatchModel",
            display_name="ΔConv Patch Model",
            category=CATEGORY,
            **search_aliases(
                "ConvFusion", "faster", "speed up", "attention", "self-attention", "convolution", "hires"
            ),
            description="Puts trained ΔConv blocks in place of a model's self-attention. The model itself "
            "stays as it is; the output is a patched clone.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A U-Net (SD 1.x, SD 2.x, SDXL, ...) or PixArt; with joint mixers also FLUX, "
                    "Chroma, Z-Image, Lumina 2, Qwen-Image or SD 3.",
                ),
                FileChoice(
                    "weights",
                    lambda: [model_folder.RECOMMENDED, *model_folder.Choices().names()],
                    default=model_folder.RECOMMENDED,
                    tooltip="Files in models/deltaconv, then published weights, which are fetched when "
                    "first used. 'auto' takes the recommended ones for the model.",
                ),
                io.String.Input(
                    "blocks",
                    default="all",
                    tooltip=f"Where ΔConv stands: {BLOCKS_TOOLTIP}",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in the sampling ΔConv begins to run; attention runs before. 0 is pure "
                    "noise.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in the sampling ΔConv stops; attention runs after. 1 is the finished "
                    "picture.",
                ),
                io.Combo.Input(
                    "base_weights",
                    **ADVANCED,
                    options=[APPLY, LEAVE_OUT],
                    default=APPLY,
                    tooltip="Some published files also hold convolutions of the model that they were "
                    "trained on. 'apply' puts them into the model, 'leave out' uses the ΔConv blocks alone.",
                ),
                io.Float.Input(
                    "base_weights_strength",
                    **ADVANCED,
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="1: the file's convolutions. 0: the model's own. Between: a mixture.",
                ),
                Weights.Input(
                    "deltaconv",
                    optional=True,
                    tooltip="Weights from another node; when connected, 'weights' is not used.",
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, weights: str) -> bool | str:
        return model_folder.refusal(weights) or True

    @classmethod
    def fingerprint_inputs(cls, weights: str, **_: Any) -> Any:
        tell_again()
        return model_folder.Choices().fingerprint(weights)

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        weights: str,
        blocks: str,
        start_percent: float,
        end_percent: float,
        base_weights: str,
        base_weights_strength: float,
        deltaconv: Checkpoint | None = None,
    ) -> io.NodeOutput:
        # Older versions of ComfyUI do not check the choice in a list.
        if base_weights not in (APPLY, LEAVE_OUT):
            raise DeltaConvError(f"base_weights must be {APPLY!r} or {LEAVE_OUT!r}, got {base_weights!r}")
        strength = base_weights_strength if base_weights == APPLY else None
        settings = PatchSettings(blocks, SamplingRange(start_percent, end_percent), strength)
        found = find_joint_sites(network_of(model)) or find_sites(model)
        if deltaconv is None:
            choices = model_folder.Choices()
            auto = weights == model_folder.RECOMMENDED
            deltaconv = choices.load(choices.recommended(found.architecture) if auto else weights)
        if isinstance(found, Sites):
            patched, report = apply_checkpoint(model, found, deltaconv, settings)
        else:
            patched, report = apply_joint(
                model, found, deltaconv, blocks, settings.sampling, partial(show, hidden=cls.hidden)
            )
        return io.NodeOutput(patched, ui=ui.PreviewText(tell(report, cls.hidden)))
