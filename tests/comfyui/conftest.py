"""Fixtures of the tests that run in a real ComfyUI."""

from __future__ import annotations

from typing import Any

import pytest

from testing.comfy_models import in_pack, make_checkpoint, make_pixart, make_unet, same_state, state


@pytest.fixture(scope="session", autouse=True)
def nodes_of_the_pack(pack) -> Any:
    """The pack's nodes, imported; the model folder is registered then."""
    return in_pack(pack, "nodes")


@pytest.fixture
def unet():
    """A small U-Net MODEL; whatever the test does, its weights must be the same bits afterwards."""
    model = make_unet()
    before = state(model)
    yield model
    model.detach()
    assert same_state(before, model)


@pytest.fixture
def pixart():
    """A small PixArt MODEL; likewise."""
    model = make_pixart()
    before = state(model)
    yield model
    model.detach()
    assert same_state(before, model)


@pytest.fixture
def checkpoint(pack, unet):
    """Blocks for every site of `unet`."""
    return make_checkpoint(pack, unet)


@pytest.fixture
def output(tmp_path, comfy_host, monkeypatch):
    """ComfyUI's output folder, empty."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path / "deltaconv_runs"


@pytest.fixture
def stop_after(pack, monkeypatch):
    """Makes ComfyUI's "cancel" (or another error) come right after a step."""
    import comfy.model_management as management

    progress = in_pack(pack, "nodes.host.distill.session")._Progress
    step = progress.__call__

    def make(number, error=None):
        def stopping(self, row):
            if row.step == number:
                if error is not None:
                    raise error
                management.interrupt_current_processing(True)
            step(self, row)

        monkeypatch.setattr(progress, "__call__", stopping)
        return monkeypatch

    yield make
    management.interrupt_current_processing(False)
