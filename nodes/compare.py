"""ΔConv Compare: two batches of pictures side by side, and how alike they are."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from comfy_api.latest import io, ui

from ..deltaconv_core.likeness import check_alike, difference_map, psnr, ssim
from ..deltaconv_core.likeness.sheet import draw_sheet
from .host.report import Report, TellsAgain, tell
from .sockets import CATEGORY, search_aliases

GAIN = 4


class Compare(TellsAgain):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeltaConvCompare",
            display_name="ΔConv Compare",
            category=CATEGORY,
            **search_aliases("side by side", "difference", "PSNR", "SSIM"),
            description="Shows two batches of pictures side by side, picture by picture, with a map of their "
            "differences, PSNR and SSIM. Made for pictures of the same seeds with self-attention and ΔConv.",
            inputs=[
                io.Image.Input("first", tooltip="Pictures, such as those with self-attention."),
                io.Image.Input(
                    "second", tooltip="As many, of the same size and seeds, such as those with ΔConv."
                ),
                io.String.Input(
                    "first_label", default="self-attention", tooltip="Stands above the first pictures."
                ),
                io.String.Input("second_label", default="ΔConv", tooltip="Stands above the second pictures."),
            ],
            outputs=[
                io.Image.Output(display_name="sheet", tooltip="What the node shows."),
                io.Image.Output(
                    display_name="difference",
                    tooltip=f"Gray maps: black where a pair is equal, {GAIN} times the difference elsewhere.",
                ),
                io.String.Output(display_name="text", tooltip="PSNR and SSIM of every pair."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, first: Any, second: Any, first_label: str, second_label: str) -> io.NodeOutput:
        check_alike(first, second)
        first, second = first[..., :3], second[..., :3]
        noise, likeness = psnr(first, second), ssim(first, second)
        captions = [
            f"PSNR {_decibels(one)}, SSIM {other:.3f}"
            for one, other in zip(noise.tolist(), likeness.tolist(), strict=True)
        ]
        difference = difference_map(first, second, GAIN)
        columns = [(first_label, first), (second_label, second), (f"difference x {GAIN}", difference)]
        page = numpy.asarray(draw_sheet(columns, captions))
        sheet = torch.from_numpy(page.copy()).float().div(255).unsqueeze(0)
        lines = [f"{number}: {caption}" for number, caption in enumerate(captions, start=1)]
        if len(lines) > 1:
            mean = f"PSNR {_decibels(float(noise.mean()))}, SSIM {float(likeness.mean()):.3f}"
            lines.insert(0, f"Mean of {len(lines)} pairs: {mean}")
        told = ui.PreviewText(tell(Report(lines[:1]), cls.hidden)).as_dict()
        shown = ui.PreviewImage(sheet, cls=cls).as_dict()
        return io.NodeOutput(sheet, difference, "\n".join(lines), ui=shown | told)


def _decibels(value: float) -> str:
    return "infinite (equal)" if value == float("inf") else f"{value:.1f} dB"
