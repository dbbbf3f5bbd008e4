"""Nodes for the tests' servers that know nothing of ΔConv: a small MODEL and what a sampler needs."""

import torch

from testing import comfy_models


class PlainModel:
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "run"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def run(self):
        return (comfy_models.make_unet(channels=3),)


class PlainModelWithoutAttention(PlainModel):
    def run(self):
        depths = {"transformer_depth": [0, 0], "transformer_depth_output": [0, 0, 0, 0]}
        return (comfy_models.make_unet(channels=3, transformer_depth_middle=-1, **depths),)


class PlainConditioning:
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "run"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0})}}

    def run(self, seed):
        return (comfy_models.conditioning(seed),)


class PlainLatent:
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "run"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"width": ("INT", {"default": 24}), "height": ("INT", {"default": 16})}}

    def run(self, width, height):
        return ({"samples": torch.zeros(1, 3, height, width)},)


CLASSES = (PlainModel, PlainModelWithoutAttention, PlainConditioning, PlainLatent)
NODE_CLASS_MAPPINGS = {cls.__name__: cls for cls in CLASSES}
