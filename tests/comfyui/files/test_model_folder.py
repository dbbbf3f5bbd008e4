"""The model folder: what is listed, what is found, what is noticed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
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


def list_weights(models: Path, name: str, gate: str | None = None) -> Path:
    """The user's own list, with one record, recommended for the small U-Net."""
    record = {
        "name": name,
        "title": "A test",
        "architecture": "unet-32x2-64x3",
        "base_model": "none",
        "recommended_for": ["unet-32x2-64x3"],
        "source": {"url": f"https://example.com/{name}.safetensors"},
        "size": None,
        "sha256": None,
        "form": {"gate": gate, "scales": None, "pooling": None},
        "licence": "unknown",
        "citation": "none",
        "note": "Nothing.",
    }
    path = models / "manifest.json"
    path.write_text(json.dumps([record]))
    return path


def test_files_come_before_published_weights(pack, folder, models):
    save(pack, models / "mine.safetensors")
    save(pack, models / "sub" / "other.safetensors")
    (models / "notes.txt").write_text("no weights")
    choices = folder.Choices().names()
    assert choices[:2] == ["mine.safetensors", os.path.join("sub", "other.safetensors")]
    assert "ConvFusion-sd15-mjv5.safetensors" in choices[2:]
    assert not any(name.endswith(".txt") for name in choices)


def test_a_published_file_that_is_there_is_listed_once(pack, folder, models):
    save(pack, models / "ConvFusion-sd15-mjv5.safetensors")
    assert folder.Choices().names().count("ConvFusion-sd15-mjv5.safetensors") == 1


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
        folder.Choices().load(name)


def test_loaded_weights_can_take_part_in_training(pack, folder, models):
    save(pack, models / "mine.safetensors")
    with torch.inference_mode():
        checkpoint = folder.Choices().load("mine.safetensors")
    assert not any(p.is_inference() for block in checkpoint.blocks.values() for p in block.parameters())


@pytest.mark.parametrize("choice", ["mine.safetensors", "auto"])
def test_a_file_changed_under_the_same_name_is_noticed(pack, folder, models, choice):
    path = models / "mine.safetensors"
    save(pack, path)
    first = folder.Choices().fingerprint(choice)
    assert folder.Choices().fingerprint(choice) == first
    times = os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)
    os.utime(path, ns=times)
    assert folder.Choices().fingerprint(choice) != first


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
        folder.Choices().load("ConvFusion-sd15-mjv5.safetensors")
    assert (shown[0], shown[-1]) == ((0, 100), (100, 100))  # newer versions leave some out between


def test_fingerprints_are_json(folder, models):
    """ComfyUI compares them after a round trip."""
    assert json.loads(json.dumps(folder.Choices().fingerprint("auto"))) is not None


def test_a_broken_list_of_the_user_leaves_the_rest_usable(pack, folder, models):
    save(pack, models / "mine.safetensors")
    (models / "manifest.json").write_text("not json")
    assert "ConvFusion-sd15-mjv5.safetensors" in folder.Choices().names()
    assert folder.Choices().load("mine.safetensors").architecture == "unet-32x2-64x3"


def test_a_deep_record_takes_no_node_away(pack, folder, models):
    """Every schema asks for the choices; an error there removes the node from ComfyUI."""
    path = list_weights(models, "mine")
    (record,) = json.loads(path.read_text())
    deep = json.loads("[" * 400 + "]" * 400)
    path.write_text(json.dumps([record | {"name": "deep", "recommended_for": [deep, deep]}, record]))
    assert "mine.safetensors" in folder.Choices().names()
    in_pack(pack, "nodes.load_weights").LoadWeights.define_schema()
    in_pack(pack, "nodes.patch_model").PatchModel.define_schema()


def test_a_link_to_nothing_is_one_error_that_names_it(pack, folder, models):
    """ComfyUI lists it; it is refused when the prompt is checked, and when it is loaded."""
    (models / "mine.safetensors").symlink_to("/mnt/unplugged/mine.safetensors")
    assert "mine.safetensors" in folder.Choices().names()
    said = "mine.safetensors is in the model folder .* cannot be reached: it is a link to a file that"
    assert re.search(said, folder.refusal("mine.safetensors"))
    with pytest.raises(ValueError, match=said):
        folder.Choices().load("mine.safetensors")
    assert folder.Choices().fingerprint("mine.safetensors") is not None
    assert folder.Choices().fingerprint("auto") is not None


def test_a_file_that_is_taken_away_after_it_was_listed(pack, folder, models):
    save(pack, models / "mine.safetensors")
    choices = folder.Choices()
    assert "mine.safetensors" in choices.names()
    (models / "mine.safetensors").unlink()
    assert choices.fingerprint("mine.safetensors")[0] == "mine.safetensors"
    with pytest.raises(ValueError, match="mine.safetensors is in the model folder .* cannot be reached"):
        choices.load("mine.safetensors")


def test_a_file_that_may_not_be_read(pack, folder, models, monkeypatch):
    """root may read all, so the system's answer is made up."""
    save(pack, models / "mine.safetensors")

    def refuse(*args, **more):
        raise PermissionError(13, "Permission denied", str(models / "mine.safetensors"))

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(ValueError, match="mine.safetensors .*Permission denied"):
        folder.Choices().load("mine.safetensors")


@pytest.mark.parametrize("name", ["x" * 5000, "\ud800", "a\0b", "../" * 100])
def test_names_of_no_file_are_refused_in_a_line(folder, models, name):
    assert (
        "is neither a file in the model folder" in folder.refusal(name) and len(folder.refusal(name)) < 2001
    )
    folder.refusal(name).encode()
    with pytest.raises(ValueError, match="is neither a file"):
        folder.Choices().load(name)


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
    list_weights(models, "Theirs", gate="scaled")
    assert folder.Choices().recommended("unet-32x2-64x3") == "Theirs.safetensors"
    assert {b.spec.gate for b in folder.Choices().load("Theirs.safetensors").blocks.values()} == {"scaled"}


def test_a_file_in_a_subfolder_is_checked_as_its_record_says(pack, folder, models):
    """Its hash is pinned when it is first used, and compared after that."""
    list_weights(models, "Theirs")
    path = models / "sub" / "Theirs.safetensors"
    save(pack, path)
    name = os.path.join("sub", "Theirs.safetensors")
    folder.Choices().load(name)
    save(pack, path, kernel_size=5)
    with pytest.raises(in_pack(pack, "deltaconv_core").FetchError, match="has sha256"):
        folder.Choices().load(name)


def test_a_prompt_reads_each_list_once_and_again_when_it_has_changed(pack, models, unet, monkeypatch):
    """All that ComfyUI does with a prompt whose choice is "auto"."""
    manifest, node = in_pack(pack, "deltaconv_core.weights.manifest"), in_pack(pack, "nodes.patch_model")
    lists = {manifest.builtin_path(), list_weights(models, "One")}
    for name, kernel_size in (("One", 3), ("Another", 5)):
        save(pack, models / f"{name}.safetensors", kernel_size)
    manifest.known.reset()
    reads, read_text = Counter(), Path.read_text

    def run() -> int:
        """The kernel size of the blocks that "auto" led to."""
        node.PatchModel.GET_NODE_INFO_V1()
        assert node.PatchModel.validate_inputs("auto") is True
        node.PatchModel.fingerprint_inputs("auto")
        with torch.inference_mode():
            patched = node.PatchModel.execute(unet, "auto", "all", 0.0, 1.0, "apply", 1.0).args[0]
        blocks = in_pack(pack, "nodes.host.patch.applied").blocks_on(patched).blocks
        return next(iter(blocks)).spec.kernel_size

    def counted(path, *args, **options):
        reads[path] += 1
        return read_text(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", counted)
    assert run() == 3
    assert {path: reads[path] for path in lists} == dict.fromkeys(lists, 1)
    list_weights(models, "Another")
    assert run() == 5
    assert reads[models / "manifest.json"] == 2 and reads[manifest.builtin_path()] == 1


@pytest.mark.parametrize("subfolder", ["", "sub"])
def test_the_users_file_is_read_although_one_of_its_name_comes_along(pack, folder, models, subfolder):
    manifest = in_pack(pack, "deltaconv_core.weights.manifest")
    bundled = next(r for r in manifest.load_manifest() if isinstance(r.source, manifest.RepositorySource))
    assert folder.Choices().load(bundled.filename).architecture == bundled.architecture
    save(pack, models / subfolder / bundled.filename)
    loaded = folder.Choices().load(os.path.join(subfolder, bundled.filename))
    assert loaded.architecture == "unet-32x2-64x3" != bundled.architecture
