"""What `applied` says is on a model."""

from __future__ import annotations

import copy

import pytest
import torch

from deltaconv_core import DeltaConvError, save_checkpoint
from deltaconv_core.diffusers import applied, apply, remove
from testing.diffusers_models import make_checkpoint, make_pipeline


def test_what_is_on_a_model(case, tmp_path):
    assert applied(case.model) is None
    case.checkpoint.metadata["teacher"] = "a model"
    save_checkpoint(case.checkpoint, tmp_path / "weights.safetensors")
    apply(case.model, tmp_path / "weights.safetensors")
    found = applied(case.model)
    assert (found.architecture, found.mixer) == (case.checkpoint.architecture, "deltaconv")
    assert found.specs == {site: block.spec for site, block in case.checkpoint.blocks.items()}
    assert (found.start_percent, found.end_percent) == (0.0, 1.0)
    assert (found.base_weights, found.base_weights_strength) == ((), 0.0)
    assert found.source == str(tmp_path / "weights.safetensors")
    assert found.metadata == {"teacher": "a model"}
    remove(case.model)
    assert applied(case.model) is None


def test_a_pipeline_some_sites_and_a_range(tmp_path):
    pipeline = make_pipeline(tmp_path)
    checkpoint = make_checkpoint(pipeline.unet)
    apply(pipeline, checkpoint, blocks="up,-up_blocks.1.attentions.0", start_percent=0.25, end_percent=0.75)
    found = applied(pipeline)
    wanted = [s for s in checkpoint.blocks if s.startswith("up") and "up_blocks.1.attentions.0" not in s]
    assert wanted and sorted(found.specs) == sorted(wanted)
    assert (found.start_percent, found.end_percent, found.source) == (0.25, 0.75, None)
    assert applied(pipeline.unet) is found


def test_base_weights_and_what_replaced_what(sd):
    name = "down_blocks.0.resnets.0.conv1.weight"
    sd.checkpoint.base_weights = {name: torch.zeros_like(sd.model.get_parameter(name))}
    apply(sd.model, sd.checkpoint, base_weights_strength=0.5)
    assert (applied(sd.model).base_weights, applied(sd.model).base_weights_strength) == ((name,), 0.5)
    apply(sd.model, sd.checkpoint, base_weights_strength=0.0)
    assert (applied(sd.model).base_weights, applied(sd.model).base_weights_strength) == ((), 0.0)


def test_a_refusal_changes_nothing(sd):
    apply(sd.model, sd.checkpoint, blocks="mid")
    before = applied(sd.model)
    with pytest.raises(DeltaConvError, match="matches no site"):
        apply(sd.model, sd.checkpoint, blocks="nowhere")
    assert applied(sd.model) is before


def test_a_copy_says_the_same(sd):
    apply(sd.model, sd.checkpoint)
    assert applied(copy.deepcopy(sd.model)) == applied(sd.model)


def test_what_is_no_model_is_refused():
    with pytest.raises(DeltaConvError, match="expected a diffusers model"):
        applied("model")
