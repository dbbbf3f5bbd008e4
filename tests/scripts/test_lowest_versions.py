"""Which versions are the lowest that this project allows."""

from __future__ import annotations

from importlib.metadata import requires

import pytest

from scripts.lowest_versions import lowest


def test_the_floor_of_each_requirement_is_pinned():
    assert lowest(["b<2,>=1.10.3", "a>=0.4"]) == ["a==0.4", "b==1.10.3"]


def test_torch_and_the_tools_for_development_are_left_out():
    requirements = ["torch>=2.4", 'ruff==1; extra == "dev"', 'ComfyUI-DeltaConv[diffusers]; extra == "train"']
    assert lowest([*requirements, 'pillow>=1; extra == "train"']) == ["pillow==1"]


def test_a_requirement_of_another_system_is_left_out():
    assert lowest(['a>=1; platform_system == "Plan 9" and extra == "plot"']) == []


def test_a_requirement_without_a_floor_is_an_error():
    with pytest.raises(ValueError, match="not enough values"):
        lowest(["a<2"])


def test_every_package_that_is_used_has_a_floor():
    pinned = {pin.partition("==")[0] for pin in lowest(requires("ComfyUI-DeltaConv") or [])}
    assert pinned >= {"diffusers", "transformers", "huggingface_hub", "safetensors", "pillow", "accelerate"}
