"""The model folder: what is listed, what is found, what is noticed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from testing.comfy_models import in_pack, make_checkpoint, make_unet


@pytest.fixture
def models(pack) -> Path:
    """The model folder, empty before and after."""
    import folder_paths

    path = Path(folder_paths.get_folder_paths("deltaconv")[0])
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def folder(pack):
    return in_pack(pack, "nodes.host.files.model_folder")


def save(pack, path: Path, kernel_size: int = 3):
    path.parent.mkdir(exist_ok=True)
    in_pack(pack, "deltaconv_core").save_checkpoint(make_checkpoint(pack, make_unet(), kernel_size), path)


def test_files_come_before_published_weights(pack, folder, models):
    save(pack, models / "mine.safetensors")
    save(pack, models / "sub" / "other.safetensors")
    (models / "notes.txt").write_text("no weights")
    choices = folder.choices()
    assert choices[:2] == ["mine.safetensors", os.path.join("sub", "other.safetensors")]
    assert "ConvFusion-sd15-mjv5.safetensors" in choices[2:]
    assert not any(name.endswith(".txt") for name in choices)


def test_a_published_file_that_is_there_is_listed_once(pack, folder, models):
    save(pack, models / "ConvFusion-sd15-mjv5.safetensors")
    assert folder.choices().count("ConvFusion-sd15-mjv5.safetensors") == 1


def test_registering_keeps_what_the_user_configured(pack, folder, models, monkeypatch, tmp_path):
    """extra_model_paths.yaml is read before the nodes are."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    folder_paths.folder_names_and_paths["deltaconv"] = ([str(tmp_path)], set())
    folder.register()
    paths, extensions = folder_paths.folder_names_and_paths["deltaconv"]
    assert paths == [str(tmp_path), str(models)]
    assert extensions == {".safetensors"}


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "sub/../../secret.safetensors", "absent.safetensors", ""]
)
def test_only_listed_files_are_opened(pack, folder, models, name):
    save(pack, models.parent / "secret.safetensors")
    error = in_pack(pack, "deltaconv_core").DeltaConvError
    with pytest.raises(error, match="neither a file in the model folder"):
        folder.load(name)


def test_loaded_weights_can_take_part_in_training(pack, folder, models):
    save(pack, models / "mine.safetensors")
    with torch.inference_mode():
        checkpoint = folder.load("mine.safetensors")
    assert not any(p.is_inference() for block in checkpoint.blocks.values() for p in block.parameters())


@pytest.mark.parametrize("choice", ["mine.safetensors", "auto"])
def test_a_file_changed_under_the_same_name_is_noticed(pack, folder, models, choice):
    path = models / "mine.safetensors"
    save(pack, path)
    first = folder.fingerprint(choice)
    assert folder.fingerprint(choice) == first
    times = os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)
    os.utime(path, ns=times)
    assert folder.fingerprint(choice) != first


def test_fetching_shows_progress_and_stops_when_interrupted(folder, models, monkeypatch):
    import comfy.model_management
    import comfy.utils

    shown = []

    def fetch(record, place, *, progress, cancelled):
        assert (record.name, place) == ("ConvFusion-sd15-mjv5", models)
        for done in (0, 50 << 20, 100 << 20):
            progress(done, 100 << 20)
        progress(7, None)
        cancelled()
        comfy.model_management.interrupt_current_processing()
        cancelled()

    monkeypatch.setattr(folder, "resolve", fetch)
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, *_, **__: shown.append((done, total))
    )
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        folder.load("ConvFusion-sd15-mjv5.safetensors")
    assert (shown[0], shown[-1]) == ((0, 100), (100, 100))  # newer versions leave some out between


def test_fingerprints_are_json(folder, models):
    """ComfyUI compares them after a round trip."""
    assert json.loads(json.dumps(folder.fingerprint("auto"))) is not None


def test_a_broken_list_of_the_user_leaves_the_rest_usable(pack, folder, models):
    save(pack, models / "mine.safetensors")
    (models / "manifest.json").write_text("not json")
    assert "ConvFusion-sd15-mjv5.safetensors" in folder.choices()
    assert folder.load("mine.safetensors").architecture == "unet-32x2-64x3"


def test_the_users_list_tells_the_form_of_a_file(pack, folder, models):
    """A file of the authors' kind does not say its gate; the record of its name does."""
    from safetensors.torch import save_file

    checkpoint = make_checkpoint(pack, make_unet())
    tensors = {
        f"{id.removesuffix('.attn1')}.conv1.{name}": value
        for id, block in checkpoint.blocks.items()
        for name, value in block.state_dict().items()
    }
    save_file(tensors, models / "Theirs.safetensors")
    record = {
        "name": "Theirs",
        "title": "A test",
        "architecture": "unet-32x2-64x3",
        "base_model": "none",
        "recommended_for": ["unet-32x2-64x3"],
        "source": {"url": "https://example.com/Theirs.safetensors"},
        "size": None,
        "sha256": None,
        "form": {"gate": "scaled", "scales": None, "pooling": None},
        "licence": "unknown",
        "citation": "none",
        "note": "Nothing.",
    }
    (models / "manifest.json").write_text(json.dumps([record]))
    assert folder.recommended("unet-32x2-64x3") == "Theirs.safetensors"
    assert {b.spec.gate for b in folder.load("Theirs.safetensors").blocks.values()} == {"scaled"}
