"""Files of joint mixers: exact, shown, and told from those of other mixers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from deltaconv_core import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from deltaconv_core.commands.inspect import lines_of
from deltaconv_core.mixers.hybrid import HybridMixer, HybridSpec
from deltaconv_core.mixers.joint import JointLayout, JointMixer, JointSpec
from deltaconv_core.mixers.shared import shared_mixer
from deltaconv_core.weights.cast import cast
from deltaconv_core.weights.hub_folder import save_hub_folder
from testing.compare import ROUNDING, largest_error

SITE, OTHER, KEPT = (f"transformer_blocks.{i}.attn" for i in range(3))


def small():
    torch.manual_seed(0)
    mixers = {
        SITE: JointMixer(JointSpec(8, 2, 4, landmarks=4, kernel_size=3, scales=(1.0, 0.5))),
        OTHER: JointMixer(JointSpec(8, 2, 4, landmarks=9, window=3, kernel_size=0), dtype=torch.float16),
    }
    with torch.no_grad():
        for mixer in mixers.values():
            for parameter in mixer.parameters():
                parameter.normal_()
    sizes = {"sizes": "64x64, 128x128"}
    return Checkpoint("qwen_image", mixers, metadata=sizes, kept={KEPT: "its error is 0.4, above 0.3"})


@pytest.fixture
def path(tmp_path):
    save_checkpoint(small(), tmp_path / "joint.safetensors")
    return tmp_path / "joint.safetensors"


def test_round_trip_is_exact(path):
    loaded, original = load_checkpoint(path), small()
    assert (loaded.architecture, loaded.mixer) == ("qwen_image", "joint")
    assert (loaded.kept, loaded.metadata) == (original.kept, original.metadata)
    q, k, v = torch.randn(3, 1, 2, 5 + 15, 4)
    for site, mixer in original.blocks.items():
        assert loaded.blocks[site].spec == mixer.spec
    expected = original.blocks[SITE](q, k, v, JointLayout((3, 5), 5))
    with torch.no_grad():
        own = loaded.blocks[SITE](q, k, v, JointLayout((3, 5), 5))
    assert largest_error(own, expected.detach()) < ROUNDING
    save_checkpoint(loaded, path.with_name("again.safetensors"))
    assert path.with_name("again.safetensors").read_bytes() == path.read_bytes()


def test_the_header_names_mixer_family_and_sizes(path):
    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["deltaconv"])
    assert (description["format"], description["mixer"]) == (2, "joint")
    assert description["architecture"] == "qwen_image"
    assert description["metadata"]["sizes"] == "64x64, 128x128"


def test_kinds_are_not_mixed(tmp_path):
    checkpoint = small()
    checkpoint.blocks["another"] = HybridMixer(HybridSpec(8, 2, 4))
    with pytest.raises(CheckpointError, match="one kind, got hybrid and joint"):
        save_checkpoint(checkpoint, tmp_path / "a.safetensors")


def test_cast_and_shared(path):
    half = cast(load_checkpoint(path), torch.float16)
    assert {p.dtype for block in half.blocks.values() for p in block.parameters()} == {torch.float16}
    own = shared_mixer(half.blocks[SITE])
    assert own.spec == half.blocks[SITE].spec and own.gain.data_ptr() == half.blocks[SITE].gain.data_ptr()


def test_inspect_and_the_model_card_show_them(path, tmp_path):
    text = "\n".join(lines_of(load_checkpoint(path)))
    assert f"attention stays at {KEPT}: its error" in text and "joint mixers: 2, " in text
    row = next(line for line in text.splitlines() if line.startswith(SITE))
    assert row.split()[1:] == ["8", "2", "4", "–", "3", "1,", "0.5", "float32", "40"]
    save_hub_folder(load_checkpoint(path), tmp_path / "folder")
    assert load_checkpoint(tmp_path / "folder").mixer == "joint"
    assert "| mixers | 2 " in (tmp_path / "folder" / "README.md").read_text(encoding="utf-8")
