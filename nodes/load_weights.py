"""ΔConv Load Weights: trained blocks from the model folder."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..deltaconv_core.sites.report import Report, assumptions
from ..deltaconv_core.weights.checkpoint import DELTACONV_KIND
from .host.files import model_folder
from .host.files.choice import FileChoice
from .host.report import tell, tell_again
from .sockets import CATEGORY, Weights, search_aliases


class LoadWeights(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeltaConvLoadWeights",
            display_name="ΔConv Load Weights",
            category=CATEGORY,
            **search_aliases("ConvFusion"),
            description="Loads trained ΔConv blocks, for ΔConv Patch Model and the other ΔConv nodes.",
            inputs=[
                FileChoice(
                    "weights",
                    lambda: model_folder.Choices().names(),
                    tooltip="Files in models/deltaconv, then published weights, which are fetched when "
                    "first used.",
                ),
            ],
            outputs=[Weights.Output(display_name="deltaconv")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, weights: str) -> bool | str:
        return model_folder.refusal(weights) or True

    @classmethod
    def fingerprint_inputs(cls, weights: str) -> Any:
        tell_again()
        return model_folder.Choices().fingerprint(weights)

    @classmethod
    def execute(cls, weights: str) -> io.NodeOutput:
        checkpoint = model_folder.Choices().load(weights)
        parameters = sum(block.spec.num_parameters for block in checkpoint.blocks.values())
        mixer = checkpoint.mixer != DELTACONV_KIND
        amount = f"{parameters:,}" if mixer else f"{parameters / 1e6:.3g} M"
        line = (
            f"{weights}: {len(checkpoint.blocks)} {f'{checkpoint.mixer} mixers' if mixer else 'blocks'} for "
            f"{checkpoint.architecture} ({amount} parameters), {len(checkpoint.base_weights)} base weights."
        )
        return io.NodeOutput(
            checkpoint, ui=ui.PreviewText(tell(Report([line], assumptions(checkpoint)), cls.hidden))
        )
