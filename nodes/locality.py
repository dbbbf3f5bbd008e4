"""ΔConv Attention Locality: how local a model's self-attention is, as a picture, a table and advice."""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ..deltaconv_core.locality import Recommendation, check_limit, recommend
from ..deltaconv_core.locality.figure import check_matplotlib, draw_figure
from ..deltaconv_core.locality.sampled_steps import spread
from ..deltaconv_core.locality.table import text
from .host.locality.look import Look, LookSettings, look
from .host.report import Report, TellsAgain, left_out, tell
from .sockets import ADVANCED, BLOCKS_TOOLTIP, CATEGORY, search_aliases


class AttentionLocality(TellsAgain):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeltaConvLocality",
            display_name="ΔConv Attention Locality",
            category=CATEGORY,
            **search_aliases("self-attention", "receptive field", "analyze"),
            description="Looks at a model's self-attention while it draws a picture: how much of it lies "
            "near each query, how far every layer really sees, and which kernel size ΔConv would need there.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A U-Net (SD 1.x, SD 2.x, SDXL, ...) or PixArt; or, to look only: FLUX, Chroma, "
                    "SD 3, Lumina 2, Z-Image, Qwen-Image.",
                ),
                io.Conditioning.Input("positive", tooltip="What is drawn. Sampled without guidance."),
                io.Latent.Input(
                    "latent", tooltip="Its size is that of the picture; the content does not count."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Seed of the noise.",
                ),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Steps of the sampling (Euler)."),
                io.Int.Input(
                    "looks",
                    **ADVANCED,
                    default=4,
                    min=1,
                    max=1000,
                    tooltip="At how many of these steps the attention is looked at, evenly spread. Looking "
                    "costs more than the step itself.",
                ),
                io.String.Input("blocks", default="all", tooltip=f"What is looked at: {BLOCKS_TOOLTIP}"),
                io.Int.Input(
                    "max_kernel_size",
                    **ADVANCED,
                    default=13,
                    min=3,
                    max=63,
                    step=2,
                    tooltip="The largest kernel to recommend, odd. Layers that would need more are to be "
                    "left alone.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="figure"),
                io.String.Output(display_name="table"),
                io.String.Output(display_name="recommendation"),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: Any,
        latent: dict[str, Any],
        seed: int,
        steps: int,
        looks: int,
        blocks: str,
        max_kernel_size: int,
    ) -> io.NodeOutput:
        check_limit(max_kernel_size)
        check_matplotlib()
        seen = look(model, positive, latent, LookSettings(steps, looks, blocks, seed))
        advice = _advice(seen, max_kernel_size)
        height, width = seen.size
        moments = _moments(steps, looks)
        title = f"Self-attention of {seen.architecture}, {width} × {height} latent, steps {moments}"
        picture = torch.from_numpy(draw_figure(seen.layers, advice, title)).float().div(255).unsqueeze(0)
        table = f"{title}\n\n{text(seen.layers, advice)}"
        told = ui.PreviewText(tell(_report(seen, advice), cls.hidden)).as_dict()
        shown = ui.PreviewImage(picture, cls=cls).as_dict()
        return io.NodeOutput(picture, table, advice.to_json(), ui=shown | told)


def _advice(seen: Look, max_kernel_size: int) -> Recommendation:
    if seen.replaceable:
        return recommend(seen.layers, seen.architecture, max_kernel_size)
    return Recommendation(seen.architecture, skip=tuple(layer.site for layer in seen.layers))


def _moments(steps: int, looks: int) -> str:
    at = [str(step + 1) for step in spread(steps, looks)]
    return f"{', '.join(at) if len(at) <= 6 else f'{at[0]} to {at[-1]} ({len(at)})'} of {steps}"


def _report(seen: Look, advice: Recommendation) -> Report:
    fields = [layer.erf for layer in seen.layers]
    line = (
        f"Looked at {len(fields)} self-attentions of {seen.architecture}: effective receptive fields of "
        f"{min(fields)} to {max(fields)} tokens."
    )
    if seen.replaceable:
        line += f" ΔConv is recommended for {len(advice.kernel_sizes)}."
    else:
        line += " ΔConv cannot stand in for attention that text and image share; this is for looking only."
    return Report([line], left_out(seen.unseen))
