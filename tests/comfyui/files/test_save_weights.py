"""ΔConv Save Weights: what is in the file, where it may be, and that it is found again."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from testing.comfy_distill import weights
from testing.comfy_models import in_pack, make_hybrids, patch, sample
from testing.compare import ROUNDING, largest_error, same_weights


@pytest.fixture
def models(tmp_path, comfy_host, monkeypatch):
    """The model folder, empty."""
    import folder_paths

    _, extensions = folder_paths.folder_names_and_paths["deltaconv"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "deltaconv", ([str(tmp_path)], extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def save(pack, checkpoint, filename_prefix="mine", dtype="fp32", **options):
    node = in_pack(pack, "nodes.save_weights").SaveWeights
    with torch.inference_mode():
        return node.execute(checkpoint, filename_prefix, dtype, **options).ui.as_dict()["text"][0]


def test_what_was_saved_is_loaded(pack, models, unet, checkpoint):
    text = save(pack, checkpoint)
    assert text.startswith(
        f"Saved 5 blocks for {checkpoint.architecture} to {models / 'mine_00001.safetensors'}"
    )
    folder = in_pack(pack, "nodes.host.files.model_folder")
    assert "mine_00001.safetensors" in folder.Choices().names()
    loaded = folder.Choices().load("mine_00001.safetensors")
    assert same_weights(weights(checkpoint), weights(loaded))
    expected = sample(patch(pack, unet, checkpoint))
    assert largest_error(sample(patch(pack, unet, loaded)), expected) < ROUNDING
    assert largest_error(sample(unet), expected) > ROUNDING


def test_the_text_says_what_was_saved(pack, models, unet):
    assert save(pack, make_hybrids(pack, unet)).startswith("Saved 5 hybrid mixers for ")


def test_no_file_is_ever_overwritten(pack, models, checkpoint):
    for _ in range(3):
        save(pack, checkpoint)
    assert sorted(path.name for path in models.iterdir()) == [f"mine_0000{n}.safetensors" for n in (1, 2, 3)]


def test_texts_join_those_that_were_there(pack, models, checkpoint):
    checkpoint.metadata |= {"teacher": "a model", "title": "old", "license": "MIT"}
    save(pack, checkpoint, title=" Mine ", author="Ada")
    metadata = (
        in_pack(pack, "nodes.host.files.model_folder").Choices().load("mine_00001.safetensors").metadata
    )
    assert metadata == {"teacher": "a model", "title": "Mine", "author": "Ada", "license": "MIT"}
    assert checkpoint.metadata["title"] == "old"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("keep", [True, False])
def test_dtypes_and_base_weights(pack, models, checkpoint, dtype, keep):
    name = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    checkpoint.base_weights["down_blocks.0.resnets.0.conv1.weight"] = torch.ones(2, 2, 3, 3)
    save(pack, checkpoint, dtype=name, keep_base_weights=keep)
    loaded = in_pack(pack, "nodes.host.files.model_folder").Choices().load("mine_00001.safetensors")
    assert {w.dtype for w in weights(loaded).values()} == {dtype}
    assert [w.dtype for w in loaded.base_weights.values()] == [dtype] * keep
    assert {w.dtype for w in weights(checkpoint).values()} == {torch.float32}


def test_numbers_too_large_for_fp16(pack, models, checkpoint):
    next(iter(checkpoint.blocks.values())).conv_pool.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"conv_pool.weight has values up to 1e\+06, too large for float16"):
        save(pack, checkpoint, dtype="fp16")
    assert list(models.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "", " ", "../mine", "a/../../mine", "/tmp/mine", "a/", ".mine", "a\\b", "x:y",
        "x" * 300, "a/" + "ä" * 150 + "/b", "\ud800", "con/x", "nul", "a./b", "x.", "a//b", "x\0",
        "a\x7f", "aux.txt/x",
    ],
)  # fmt: skip
def test_names_that_lead_elsewhere(pack, models, checkpoint, name):
    with pytest.raises(ValueError, match="expected a name such as"):
        save(pack, checkpoint, filename_prefix=name)
    assert list(models.iterdir()) == [] and list(models.parent.glob("mine*")) == []


def test_the_longest_names_are_saved(pack, models, checkpoint):
    save(pack, checkpoint, filename_prefix="ä" * 100 + "/" + "x" * 200)
    assert [file.name for file in models.rglob("*.safetensors")] == ["x" * 200 + "_00001.safetensors"]


def test_a_link_to_nothing_is_not_written_through(pack, models, checkpoint):
    (models / "mine_00001.safetensors").symlink_to(models.parent / "elsewhere.safetensors")
    save(pack, checkpoint, filename_prefix="mine")
    assert (models / "mine_00002.safetensors").is_file()
    assert not (models.parent / "elsewhere.safetensors").exists()


def test_numbers_that_are_all_taken(pack, models, checkpoint, monkeypatch):
    monkeypatch.setattr(in_pack(pack, "deltaconv_core.util.free_path"), "NUMBERS", range(1, 3))
    save(pack, checkpoint, filename_prefix="mine")
    save(pack, checkpoint, filename_prefix="mine")
    with pytest.raises(ValueError, match="holds 2 of 'mine' already; choose another name"):
        save(pack, checkpoint, filename_prefix="mine")


def test_saves_at_one_moment_get_names_of_their_own(pack, models, checkpoint):
    """As two servers with one model folder, or two prompts."""
    save(pack, checkpoint)  # what is imported at the first time is imported
    start = threading.Barrier(4)

    def one(_):
        start.wait()
        return save(pack, checkpoint)

    for _ in range(5):
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(one, range(4)))
    names = {f"mine_{number:05}.safetensors" for number in range(1, 22)}
    assert {file.name for file in models.iterdir()} == names


def test_a_name_is_free_again_after_a_save_that_failed(pack, models, checkpoint, monkeypatch):
    def fail(*args):
        raise OSError("no space left")

    node = in_pack(pack, "nodes.save_weights")
    with monkeypatch.context() as broken:
        broken.setattr(node, "save_checkpoint", fail)
        with pytest.raises(OSError, match="no space"):
            save(pack, checkpoint)
    assert list(models.iterdir()) == []
    assert "mine_00001.safetensors" in save(pack, checkpoint)


def test_new_runs_at_one_moment_get_folders_of_their_own(pack, output):
    runs = in_pack(pack, "nodes.host.distill.runs")
    with ThreadPoolExecutor(8) as threads:
        folders = list(threads.map(lambda _: runs.open_run(runs.NEW, "mine").path, range(24)))
    assert len(set(folders)) == 24
    assert {folder.name for folder in output.iterdir()} == {f"mine_{n:05}" for n in range(1, 25)}


def test_folders_inside(pack, models, checkpoint):
    save(pack, checkpoint, filename_prefix="styles/old/mine")
    assert (
        "styles/old/mine_00001.safetensors"
        in in_pack(pack, "nodes.host.files.model_folder").Choices().names()
    )


def test_an_unknown_dtype(pack, models, checkpoint):
    with pytest.raises(ValueError, match="dtype must be one of fp32, bf16, fp16, got 'int8'"):
        save(pack, checkpoint, dtype="int8")
