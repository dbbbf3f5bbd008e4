"""ΔConv Save Weights: trained blocks into the model folder, with what others should know about them."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..deltaconv_core.util.whole_file import release
from ..deltaconv_core.weights.checkpoint import DELTACONV_KIND, Checkpoint, save_checkpoint
from .host.files import model_folder
from .host.files.save import SHORT_DTYPES, prepared
from .host.report import Report, TellsAgain, tell
from .sockets import CATEGORY, Weights


class SaveWeights(TellsAgain):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeltaConvSaveWeights",
            display_name="ΔConv Save Weights",
            category=CATEGORY,
            description="Saves ΔConv blocks to models/deltaconv, where ΔConv Patch Model finds them.",
            is_output_node=True,
            inputs=[
                Weights.Input(
                    "deltaconv", tooltip="From ΔConv Distill, or any other node that gives blocks."
                ),
                io.String.Input(
                    "filename_prefix",
                    default="my_model",
                    tooltip="The file's name; a number is added, so no file is ever overwritten. May begin "
                    "with folders: styles/my_model",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(SHORT_DTYPES),
                    default="fp16",
                    tooltip="Of the saved numbers. fp16 halves the file; fp32 keeps every bit.",
                ),
                io.String.Input(
                    "title", default="", optional=True, tooltip="What these weights are, for people."
                ),
                io.String.Input("author", default="", optional=True, tooltip="Who made them."),
                io.String.Input(
                    "license",
                    default="",
                    optional=True,
                    tooltip="On what terms others may use them; mind that of the model they were distilled "
                    "from. Example: CC-BY-4.0",
                ),
                io.Boolean.Input(
                    "keep_base_weights",
                    default=True,
                    optional=True,
                    tooltip="Some published files also hold convolutions of the model they were trained on: "
                    "save those too.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        deltaconv: Checkpoint,
        filename_prefix: str,
        dtype: str,
        title: str = "",
        author: str = "",
        license: str = "",
        keep_base_weights: bool = True,
    ) -> io.NodeOutput:
        texts = {"title": title, "author": author, "license": license}
        checkpoint = prepared(deltaconv, dtype, texts, keep_base_weights)
        path = model_folder.path_to_save(filename_prefix)
        try:
            save_checkpoint(checkpoint, path)
        finally:
            release(path)
        size = path.stat().st_size / 1e6
        what = "blocks" if checkpoint.mixer == DELTACONV_KIND else f"{checkpoint.mixer} mixers"
        line = (
            f"Saved {len(checkpoint.blocks)} {what} for {checkpoint.architecture} to {path} ({size:.3g} MB)."
        )
        return io.NodeOutput(ui=ui.PreviewText(tell(Report([line]), cls.hidden)))
