"""Files of hybrid mixers: exact, shown, and refused by whoever does not know them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deltaconv_core import (
    BlockSpec,
    Checkpoint,
    CheckpointError,
    DeltaConvBlock,
    DeltaConvError,
    load_checkpoint,
    save_checkpoint,
)
from deltaconv_core.commands.inspect import lines_of
from deltaconv_core.mixers.hybrid import HybridMixer, HybridSpec
from deltaconv_core.sites.match import matching_sites
from deltaconv_core.weights.authors_write import save_authors
from deltaconv_core.weights.hub_folder import save_hub_folder
from testing.compare import ROUNDING, largest_error

SITE, OTHER, KEPT = (
    f"{part}.attentions.0.transformer_blocks.0.attn1"
    for part in ("down_blocks.0", "mid_block", "up_blocks.1")
)
ARCHITECTURE = "unet-8x2-16x1"
SPEC = HybridSpec(8, 2, 4, landmarks=4, nystrom="none", kernel_size=3, scales=(1.0, 0.5), mean=True)
CHANNELS = {SITE: 8, OTHER: 16, KEPT: 8}


def small():
    torch.manual_seed(0)
    mixers = {
        SITE: HybridMixer(SPEC),
        OTHER: HybridMixer(HybridSpec(16, 4, 4, landmarks=9), dtype=torch.float16),
    }
    with torch.no_grad():
        for mixer in mixers.values():
            for parameter in mixer.parameters():
                parameter.normal_()
    kept = {KEPT: "the best mixer has an error of 0.4, above 0.3"}
    return Checkpoint(ARCHITECTURE, mixers, metadata={"teacher": "a model"}, kept=kept)


@pytest.fixture
def path(tmp_path):
    save_checkpoint(small(), tmp_path / "hybrid.safetensors")
    return tmp_path / "hybrid.safetensors"


def edited(path, edit):
    """The file with another description in its header."""
    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["deltaconv"])
    edit(description)
    save_file(load_file(path), path, {"deltaconv": json.dumps(description)})
    return path


def test_round_trip_is_exact(path):
    loaded, original = load_checkpoint(path), small()
    assert (loaded.architecture, loaded.mixer) == (ARCHITECTURE, "hybrid")
    assert (loaded.kept, loaded.metadata) == (original.kept, original.metadata)
    for site, mixer in original.blocks.items():
        own = loaded.blocks[site]
        assert own.spec == mixer.spec and own.state_dict().keys() == mixer.state_dict().keys()
        for name, tensor in mixer.state_dict().items():
            assert own.state_dict()[name].dtype == tensor.dtype and torch.equal(
                own.state_dict()[name], tensor
            )
    q, k, v = torch.randn(3, 1, 2, 15, 4)
    expected = original.blocks[SITE](q, k, v, (3, 5))
    assert largest_error(loaded.blocks[SITE](q, k, v, (3, 5)), expected) < ROUNDING
    again = path.with_name("again.safetensors")
    save_checkpoint(loaded, again)
    assert again.read_bytes() == path.read_bytes()


def test_mixers_as_they_start_are_saved_too(tmp_path):
    path = tmp_path / "plain.safetensors"
    spec = HybridSpec(8, 2, 4)
    save_checkpoint(Checkpoint(ARCHITECTURE, {SITE: HybridMixer(spec)}), path)
    assert load_checkpoint(path).blocks[SITE].spec == spec


def test_the_header_says_what_it_is_and_older_programs_read_the_version(path):
    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["deltaconv"])
    assert (description["format"], description["mixer"]) == (2, "hybrid")
    assert list(description["kept"]) == [KEPT]


def test_files_of_deltaconv_blocks_stay_as_they_were(tmp_path):
    path = tmp_path / "blocks.safetensors"
    save_checkpoint(Checkpoint("unet-8x1", {SITE: DeltaConvBlock(BlockSpec(8, 3))}), path)
    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["deltaconv"])
    assert list(description) == ["format", "architecture", "specs", "metadata"] and description["format"] == 1
    assert load_checkpoint(path).mixer == "deltaconv" and load_checkpoint(path).kept == {}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(format=3), "format version 3 and mixer 'hybrid'.* update"),
        (lambda d: d.update(format=1), "format version 1 and mixer 'hybrid'"),
        (lambda d: d.pop("mixer"), "format version 2 and mixer 'deltaconv'"),
        (lambda d: d.update(mixer=["hybrid"]), r"mixers of the kind \['hybrid'\]"),
        (lambda d: d.update(mixer={}), "mixers of the kind {}"),
        (lambda d: d.update(mixer=None), "mixers of the kind None"),
        (lambda d: d.update(mixer="fourier"), "mixers of the kind 'fourier', this program knows .*hybrid"),
        (lambda d: d["specs"][SITE].update(heads=0), f"block {SITE} are wrong: expected heads"),
        (lambda d: d["specs"][SITE].update(kernel_size=5), r"kernels.0 has shape \(2, 1, 3, 3\), expected"),
        (lambda d: d["specs"].pop(OTHER), "unknown"),
        (lambda d: d.pop("kept"), "expected kept in its header to be an object"),
        (lambda d: d["kept"].update({SITE: "no"}), f"attention cannot stay at {SITE}"),
        (lambda d: d["kept"].update({KEPT: 3}), "expected kept to be text"),
    ],
)
def test_a_wrong_file_is_refused(path, edit, message):
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(edited(path, edit))


def test_kinds_are_not_mixed(tmp_path):
    checkpoint = small()
    checkpoint.blocks[KEPT] = DeltaConvBlock(BlockSpec(8, 3))
    checkpoint.kept = {}
    with pytest.raises(CheckpointError, match="one kind, got deltaconv and hybrid"):
        save_checkpoint(checkpoint, tmp_path / "a.safetensors")


def test_settings_of_blocks_and_the_authors_form_are_refused(path, tmp_path):
    with pytest.raises(CheckpointError, match="gate can be set for ΔConvBlocks"):
        load_checkpoint(path, gate="sigmoid")
    with pytest.raises(DeltaConvError, match="the authors' form works on ΔConvBlocks; .* hybrid mixers"):
        save_authors(load_checkpoint(path), tmp_path / "authors.safetensors")


def test_a_folder_of_them_says_what_they_are(path, tmp_path):
    save_hub_folder(load_checkpoint(path), tmp_path / "folder")
    loaded = load_checkpoint(tmp_path / "folder")
    assert loaded.kept == small().kept and loaded.mixer == "hybrid"
    card = (tmp_path / "folder" / "README.md").read_text(encoding="utf-8")
    assert "not the block of the ΔConv paper" in card and "| mixers | 2 " in card


def test_inspect_shows_them(path):
    text = "\n".join(lines_of(load_checkpoint(path)))
    assert "landmarks  Nyström" in text and f"attention stays at {KEPT}: the best mixer" in text
    row = next(line for line in text.splitlines() if line.startswith(SITE))
    assert row.split()[1:] == [
        "8",
        "2",
        "4",
        "none",
        "–",
        "3",
        "1,",
        "0.5",
        "head",
        "yes",
        "–",
        "float32",
        "40",
    ]
    assert "hybrid mixers: 2, 44 parameters" in text


def test_sites_where_attention_stays_are_left_out_and_others_must_be_there(path):
    checkpoint = load_checkpoint(path)
    assert matching_sites(ARCHITECTURE, CHANNELS, checkpoint, "all") == (SITE, OTHER)
    assert matching_sites(ARCHITECTURE, CHANNELS, checkpoint, "mid") == (OTHER,)
    with pytest.raises(DeltaConvError, match="leave the attention at all of the selected sites.*above 0.3"):
        matching_sites(ARCHITECTURE, CHANNELS, checkpoint, "up")
    with pytest.raises(DeltaConvError, match="none for down_blocks.3.attn1"):
        matching_sites(ARCHITECTURE, CHANNELS | {"down_blocks.3.attn1": 8}, checkpoint, "all")
