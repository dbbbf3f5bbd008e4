"""Files made at commit 0a6a058 load as they did, and runs resume (`tests/fixtures/0a6a058/make.py`)."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deltaconv_core import BlockSpec, load_checkpoint
from deltaconv_core.distill import RunFolder, Settings, distill
from deltaconv_core.errors import DeltaConvError
from testing.tiny_network import batches, make_mixers, make_network

MADE = Path(__file__).parents[2] / "fixtures" / "0a6a058"
SETTINGS = Settings(
    layer_steps=4, output_steps=4, learning_rate=1e-2, warmup=2, accumulation=2, ema=0.9, save_every=3
)
STOPPED = 5


def trained(folder=None, notes=None, settings=SETTINGS):
    """(weights by name, result) of a run from the start, or from what the folder has."""
    network = make_network()
    mixers = make_mixers(network)
    result = distill(network, mixers, batches, settings, folder, notes=notes or {"data": "x"})
    weights = {f"{site}.{name}": w for site, one in mixers.items() for name, w in one.state_dict().items()}
    return weights, result


@pytest.fixture
def run(tmp_path):
    shutil.copytree(MADE / "run", tmp_path / "run")
    return RunFolder(tmp_path / "run")


def test_a_checkpoint_is_what_it_was():
    loaded = load_checkpoint(MADE / "checkpoint.safetensors")
    assert loaded.architecture == "unet-8x1-16x1"
    assert loaded.metadata == {"teacher": "tiny", "license": "MIT"}
    assert {site: block.spec for site, block in loaded.blocks.items()} == {
        "mid_block.attentions.0.transformer_blocks.0.attn1": BlockSpec.lean(8, 5),
        "up_blocks.0.attentions.0.transformer_blocks.0.attn1": BlockSpec(
            16, 7, (1.0, 0.5, 0.25), gate="sigmoid", merge="sum", pooling="bilinear", depthwise_bias=True
        ),
    }
    for block in loaded.blocks.values():
        for weight in block.state_dict().values():
            values = (torch.arange(weight.numel()) % 251 - 125).view(weight.shape) / 256
            assert weight.dtype == torch.float16 and weight.equal(values.half())
    (name, base), *others = loaded.base_weights.items()
    assert name == "down_blocks.0.resnets.0.conv1.weight" and not others
    assert base.equal(torch.arange(36.0).view(2, 2, 3, 3) / 8)


def test_a_state_is_read_to_the_bit(run):
    """Of a run that is at its end already: what it gives is the average as it was saved."""
    whole = Settings.from_dict(SETTINGS.to_dict() | {"output_steps": STOPPED - SETTINGS.layer_steps})
    before = load_file(MADE / "run/state.safetensors")
    weights, result = trained(run, settings=whole)
    assert result.step == STOPPED
    assert weights and all(weight.equal(before[f"average.{name}"]) for name, weight in weights.items())


def test_the_run_ends_as_if_it_had_never_stopped(run):
    """Within rounding: the processor that began it may round differently from this one."""
    log = run.log_file.read_text()
    expected, whole = trained()
    weights, result = trained(run)
    assert result.step == 8 and [row.step for row in result.rows] == list(range(1, 9))
    start = make_mixers(make_network())
    learned = {f"{site}.{name}": w for site, one in start.items() for name, w in one.state_dict().items()}
    for name, weight in weights.items():
        far = (expected[name] - learned[name]).abs().max()
        assert (weight - expected[name]).abs().max() < 1e-3 * far, name
    for row, other in zip(result.rows, whole.rows, strict=True):
        assert row.losses == pytest.approx(other.losses, rel=1e-4)
        assert row.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-4)
    assert run.log_file.read_text().startswith(log)
    with run.log_file.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["stage"] for row in rows] == ["layer-wise"] * 4 + ["end to end"] * 4
    assert run.load()[0].step == 8


def test_what_the_run_was_told_still_counts(run):
    other = Settings.from_dict(SETTINGS.to_dict() | {"learning_rate": 2e-2})
    with pytest.raises(DeltaConvError, match=r"learning_rate 0\.01, now 0\.02"):
        trained(run, settings=other)
    with pytest.raises(DeltaConvError, match="data 'x', now 'y'"):
        trained(run, {"data": "y"})
