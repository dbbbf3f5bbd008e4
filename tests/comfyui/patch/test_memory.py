"""What ComfyUI counts, loads and offloads for a patched MODEL: the base model and the blocks.

The device is "cpu:0", which torch takes for the CPU and ComfyUI for a device other than "cpu", so that it
makes room there before loading, as on a GPU.
"""

from __future__ import annotations

import pytest
import torch

from testing.comfy_models import make_checkpoint, make_pixart, make_unet, patch

DEVICE = torch.device("cpu", 0)


@pytest.fixture(params=[make_unet, make_pixart], ids=["unet", "pixart"])
def models(request, pack):
    """The patched MODEL, its base, and the bytes of the blocks' weights."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    base = request.param()
    base.load_device = DEVICE
    checkpoint = make_checkpoint(pack, base, kernel_size=9)
    blocks = sum(block.spec.num_parameters for block in checkpoint.blocks.values()) * 4
    yield patch(pack, base, checkpoint), base, blocks
    comfy.model_management.unload_all_models()
    comfy.model_management.free_memory(1e30, DEVICE)


def loaded(device: torch.device = DEVICE) -> list:
    import comfy.model_management

    return [entry for entry in comfy.model_management.current_loaded_models if entry.device == device]


def test_room_is_made_for_base_and_blocks(models, monkeypatch):
    import comfy.model_management as management

    patched, base, blocks = models
    asked = []
    monkeypatch.setattr(management, "free_memory", lambda size, *_, **__: asked.append(size) or [])
    management.load_models_gpu([patched])
    reserve = max(management.minimum_inference_memory(), management.extra_reserved_memory())
    # ComfyUI asks for 1.1 times the models and a reserve.
    assert (asked[0] - reserve) / 1.1 == pytest.approx(base.model_size() + blocks, rel=0.01)


def test_the_reported_memory_is_that_of_base_and_blocks(models):
    import comfy.model_management as management

    patched, base, blocks = models
    management.load_models_gpu([patched])
    total = base.model_size() + blocks
    assert blocks > 0.03 * total  # else 1 % could hide them
    assert sum(entry.model_memory() for entry in loaded()) == pytest.approx(total, rel=0.01)
    assert sum(entry.model_loaded_memory() for entry in loaded()) == pytest.approx(total, rel=0.01)
    assert sum(entry.model_offloaded_memory() for entry in loaded()) == 0


def test_both_are_offloaded_when_room_is_needed(models):
    import comfy.model_management as management

    patched, _, _ = models
    management.load_models_gpu([patched])
    own = patched.model_patches_models()[0]
    assert {entry.model for entry in loaded()} == {patched, own}
    gone = management.free_memory(1e30, DEVICE)
    assert {entry.model for entry in gone} == {patched, own}
    assert loaded() == []
    for model in (patched, own):
        assert model.loaded_size() == 0
        assert model.current_loaded_device() == model.offload_device


def test_both_are_loaded_again(models):
    import comfy.model_management as management

    patched, base, blocks = models
    for _ in range(2):
        management.load_models_gpu([patched])
        assert sum(entry.model_loaded_memory() for entry in loaded()) == pytest.approx(
            base.model_size() + blocks, rel=0.01
        )
        management.free_memory(1e30, DEVICE)
