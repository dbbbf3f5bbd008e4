"""ΔConv Demo Prompt: a few words as conditioning for the demo model."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..demo.files import teacher_file
from ..demo.words import known_words, parse_prompt, token_rows
from .sockets import CATEGORY


class DemoPrompt(io.ComfyNode):
    """Turns words into the demo model's conditioning."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeltaConvDemoPrompt",
            display_name="ΔConv Demo Prompt",
            category=CATEGORY,
            description=f"Words for a demo model; none for the negative prompt. {known_words()}",
            inputs=[
                io.String.Input(
                    "text",
                    multiline=True,
                    default="three red squares in the center, white background, frame",
                    tooltip=f"Any of these words, at most one of a kind, in any order. {known_words()}",
                )
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def validate_inputs(cls, text: str) -> bool | str:
        try:
            parse_prompt(text or "")  # linked text is not known yet
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, text: str) -> io.NodeOutput:
        from .host.demo.unet import load_words

        words = load_words(str(teacher_file()))
        return io.NodeOutput([[words[torch.tensor(token_rows(parse_prompt(text)))].unsqueeze(0), {}]])
