"""ΔConv Neighborhood Attention: self-attention cut down to a window, without training."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from .host.patch.neighborhood import add_neighborhood
from .host.report import TellsAgain, tell
from .sockets import BLOCKS_TOOLTIP, CATEGORY, search_aliases


class NeighborhoodAttention(TellsAgain):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeltaConvNeighborhoodAttention",
            display_name="ΔConv Neighborhood Attention",
            category=CATEGORY,
            **search_aliases("window", "local attention", "NATTEN"),
            description="Lets self-attention see only a window around every query. Nothing is trained: it "
            "shows what locality alone costs, before anything is distilled.",
            inputs=[
                io.Model.Input("model", tooltip="A U-Net (SD 1.x, SD 2.x, SDXL, ...) or PixArt."),
                io.Int.Input(
                    "kernel_size",
                    default=13,
                    min=1,
                    max=255,
                    step=2,
                    tooltip="Side of the window in tokens, odd. The paper's ablation uses 13. A window twice "
                    "as large as the picture is full attention.",
                ),
                io.String.Input(
                    "blocks", default="all", tooltip=f"Where the window is used: {BLOCKS_TOOLTIP}"
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, kernel_size: int, blocks: str) -> io.NodeOutput:
        clone, report = add_neighborhood(model, kernel_size, blocks)
        return io.NodeOutput(clone, ui=ui.PreviewText(tell(report, cls.hidden)))
