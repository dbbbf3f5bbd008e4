"""Nodes for the tests' servers that know nothing of ΔConv: a small MODEL and what a sampler needs."""

import importlib.util
from pathlib import Path

import torch

_spec = importlib.util.spec_from_file_location("small_models", Path(__file__).parents[2] / "small_models.py")
small_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(small_models)


class PlainModel:
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "run"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def run(self):
        return (small_models.make_unet(channels=3),)


class PlainModelWithoutAttention(PlainModel):
    def run(self):
        depths = {"transformer_depth": [0, 0], "transformer_depth_output": [0, 0, 0, 0]}
        return (small_models.make_unet(channels=3, transformer_depth_middle=-1, **depths),)


class PlainConditioning:
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "run"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0})}}

    def run(self, seed):
        return (small_models.conditioning(seed),)


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
