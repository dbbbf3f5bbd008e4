"""ΔConv Demo Model and its empty latent: a small model of our own, to try everything on."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..demo.files import teacher_file
from .sockets import CATEGORY


class DemoModel(io.ComfyNode):
    """Loads the bundled demo model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeltaConvDemoModel",
            display_name="ΔConv Demo Model",
            category=CATEGORY,
            description=(
                "A small diffusion model that comes with ΔConv: it draws shapes from a few words, in pixel "
                "space, with self-attention. Made for 48x48 pictures. Decode with the VAE 'pixel_space'."
            ),
            inputs=[],
            outputs=[
                io.Model.Output(tooltip="The model with its self-attention; patch it with ΔConv Patch Model.")
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        from .host.demo.unet import load_demo_model

        # Nodes run in inference mode; weights made there could not be trained through or distilled from.
        with torch.inference_mode(False), torch.no_grad():
            return io.NodeOutput(load_demo_model(str(teacher_file())))


class DemoLatent(io.ComfyNode):
    """An empty latent of the demo model's kind: RGB at the picture's own size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeltaConvDemoLatent",
            display_name="ΔConv Demo Latent",
            category=CATEGORY,
            description="An empty latent for ΔConv Demo Model: 3 channels at the picture's size.",
            inputs=[
                io.Int.Input(
                    "width", default=48, min=16, max=1024, step=8, tooltip="Picture width in pixels."
                ),
                io.Int.Input(
                    "height", default=48, min=16, max=1024, step=8, tooltip="Picture height in pixels."
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Pictures in the batch."),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, width: int, height: int, batch_size: int) -> io.NodeOutput:
        return io.NodeOutput({"samples": torch.zeros(batch_size, 3, height, width)})
