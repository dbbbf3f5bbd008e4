"""ΔConv Demo Model, ΔConv Joint Demo Model and their empty latent: small models of our own, to try everything
on."""

from __future__ import annotations

from pathlib import Path

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..demo.files import joint_file, teacher_file
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
        return io.NodeOutput(_load(teacher_file()))


class JointDemoModel(io.ComfyNode):
    """Loads the bundled demo model whose attention joins text and image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeltaConvJointDemoModel",
            display_name="ΔConv Joint Demo Model",
            category=CATEGORY,
            description=(
                "A second small diffusion model that comes with ΔConv, with text and image in one attention, "
                "as in Lumina 2 and Z-Image. Same words, latents and VAE as ΔConv Demo Model."
            ),
            inputs=[],
            outputs=[
                io.Model.Output(
                    tooltip="The model with its attention, for which ΔConv Convert Model makes joint mixers."
                )
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(_load(joint_file()))


def _load(file: Path) -> ModelPatcher:
    from .host.demo.unet import load_demo_model

    # Nodes run in inference mode; weights made there could not be trained through or distilled from.
    with torch.inference_mode(False), torch.no_grad():
        return load_demo_model(str(file))


class DemoLatent(io.ComfyNode):
    """An empty latent of the demo model's kind: RGB at the picture's own size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeltaConvDemoLatent",
            display_name="ΔConv Demo Latent",
            category=CATEGORY,
            description="An empty latent for both demo models: 3 channels at the picture's size.",
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
