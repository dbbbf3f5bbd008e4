"""Where the blocks are while parts of a pipeline move between devices.

The device `meta` stands for a GPU where only places matter; it has no values.
"""

from __future__ import annotations

import accelerate
import pytest
import torch

from deltaconv_core import DeltaConvError
from deltaconv_core.diffusers import apply, remove
from testing.diffusers_models import call, make_checkpoint, make_pipeline, run, sample

BASE = "down_blocks.1.resnets.0.conv1.weight"


def devices(model):
    return {weight.device.type for block in model.deltaconv.blocks.values() for weight in block.parameters()}


def on_meta(model):
    """One call with everything on the device that stands for a GPU."""
    x, context = torch.empty(1, 4, 16, 12, device="meta"), torch.empty(1, 5, 16, device="meta")
    return call(model, x, context, torch.tensor(500, device="cpu"))


def test_the_blocks_go_where_the_model_goes(case):
    apply(case.model, case.checkpoint)
    case.model.to("meta")
    assert devices(case.model) == {"meta"} and on_meta(case.model).is_meta
    remove(case.model)
    assert on_meta(case.model).is_meta


def test_a_model_without_values_does_not_say_where_blocks_belong(sd):
    apply(sd.model.to("meta"), sd.checkpoint)
    assert devices(sd.model) == {"cpu"}


def test_offloading_a_model_takes_its_blocks_along(sd):
    apply(sd.model, sd.checkpoint)
    _, hook = accelerate.cpu_offload_with_hook(sd.model, execution_device="meta")
    assert devices(sd.model) == {"cpu"}
    assert on_meta(sd.model).is_meta and devices(sd.model) == {"meta"}
    hook.remove()


def test_offloading_layer_by_layer_uses_copies(case):
    """The blocks stay where they are, and are copied for the time of each call as other layers are."""
    apply(case.model, case.checkpoint)
    accelerate.cpu_offload(case.model, execution_device="meta")
    weights = [w for block in case.model.deltaconv.blocks.values() for w in block.parameters()]
    for _ in range(2):
        assert on_meta(case.model).is_meta
    assert devices(case.model) == {"cpu"} and all(w.requires_grad is False for w in weights)


@pytest.mark.parametrize("order", ["offload first", "apply first"])
def test_an_offloaded_pipeline(tmp_path, order):
    pipe = make_pipeline(tmp_path)
    checkpoint = make_checkpoint(pipe.unet)
    apply(pipe, checkpoint, end_percent=0.8)
    expected = sample(pipe)
    if order == "offload first":
        remove(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    if order == "offload first":
        apply(pipe, checkpoint, end_percent=0.8)
    for _ in range(2):
        assert torch.equal(sample(pipe), expected)
    remove(pipe)
    plain = sample(pipe)
    pipe.remove_all_hooks()
    assert torch.equal(sample(pipe), plain) and torch.equal(plain, sample(make_pipeline(tmp_path)))


def offload_layers(model):
    """What `enable_sequential_cpu_offload` does to each model of a pipeline."""
    accelerate.cpu_offload(model, torch.device("cpu"))


def fetch_layers(model):
    """What `remove_all_hooks` of a pipeline does."""
    accelerate.hooks.remove_hook_from_module(model, recurse=True)


@pytest.mark.parametrize("order", ["offload first", "apply first"])
def test_offloaded_layers(case, order):
    model, plain = case.model, run(case.model)
    if order == "offload first":
        offload_layers(model)
    apply(model, case.checkpoint)
    if order == "apply first":
        offload_layers(model)
    other = case.fresh()
    apply(other, case.checkpoint)
    for _ in range(2):
        assert torch.equal(run(model), run(other))
    remove(model)
    assert torch.equal(run(model), plain)
    fetch_layers(model)
    assert torch.equal(run(model), plain)


def test_base_weights_that_are_out_of_reach(sd):
    model, own = sd.model, sd.model.get_parameter(BASE).clone()
    sd.checkpoint.base_weights = {BASE: own * 1.5}
    offload_layers(model)
    with pytest.raises(DeltaConvError, match=rf"{BASE} of the model is stored elsewhere.*remove_all_hooks"):
        apply(model, sd.checkpoint)
    assert "left out" in apply(model, sd.checkpoint, base_weights_strength=0.0).text
    fetch_layers(model)
    apply(model, sd.checkpoint)
    expected = run(model)
    offload_layers(model)
    assert torch.equal(run(model), expected)
    with pytest.raises(DeltaConvError, match="stored elsewhere"):
        remove(model)
    assert torch.equal(run(model), expected)
    fetch_layers(model)
    remove(model)
    assert torch.equal(model.get_parameter(BASE), own)


def test_group_offloading(sd):
    """In the library's newer way of offloading the blocks are copied for each call, too."""
    if not hasattr(sd.model, "enable_group_offload"):
        pytest.skip("this diffusers has no group offloading")
    apply(sd.model, sd.checkpoint)
    expected = run(sd.model)
    cpu = torch.device("cpu")
    sd.model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    assert torch.equal(run(sd.model), expected)
    remove(sd.model)
