"""Where the blocks are while parts of a pipeline move between devices.

The device `meta` stands for a GPU where only places matter; it has no values.
"""

from __future__ import annotations

import accelerate
import pytest
import torch
from tiny_models import call, make_checkpoint, make_pipeline, run, sample

from deltaconv_core import DeltaConvError
from deltaconv_core.diffusers import apply, remove

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


def whole_model(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def layer_by_layer(pipe):
    """What `enable_sequential_cpu_offload` does to the U-Net."""
    accelerate.cpu_offload(pipe.unet, torch.device("cpu"))


@pytest.mark.parametrize("offload", [whole_model, layer_by_layer])
@pytest.mark.parametrize("order", ["offload first", "apply first"])
def test_offloaded_pipelines(tmp_path, offload, order):
    pipe = make_pipeline(tmp_path)
    checkpoint = make_checkpoint(pipe.unet)
    apply(pipe, checkpoint, end_percent=0.8)
    expected = sample(pipe)
    if order == "offload first":
        remove(pipe)
    offload(pipe)
    if order == "offload first":
        apply(pipe, checkpoint, end_percent=0.8)
    for _ in range(2):
        assert torch.equal(sample(pipe), expected)
    remove(pipe)
    plain = sample(pipe)
    pipe.remove_all_hooks()
    assert torch.equal(sample(pipe), plain) and torch.equal(plain, sample(make_pipeline(tmp_path)))


def test_base_weights_that_are_out_of_reach(tmp_path):
    pipe = make_pipeline(tmp_path)
    checkpoint = make_checkpoint(pipe.unet)
    checkpoint.base_weights = {BASE: pipe.unet.get_parameter(BASE) * 1.5}
    own = pipe.unet.state_dict()[BASE].clone()
    layer_by_layer(pipe)
    with pytest.raises(DeltaConvError, match=rf"{BASE} of the model is stored elsewhere.*remove_all_hooks"):
        apply(pipe, checkpoint)
    assert "left out" in apply(pipe, checkpoint, base_weights_strength=0.0).text
    pipe.remove_all_hooks()
    apply(pipe, checkpoint)
    expected = sample(pipe)
    layer_by_layer(pipe)
    assert torch.equal(sample(pipe), expected)
    with pytest.raises(DeltaConvError, match="stored elsewhere"):
        remove(pipe)
    assert torch.equal(sample(pipe), expected)
    pipe.remove_all_hooks()
    remove(pipe)
    assert torch.equal(pipe.unet.state_dict()[BASE], own)


def test_group_offloading(sd):
    """In the library's newer way of offloading the blocks are copied for each call, too."""
    enable = getattr(sd.model, "enable_group_offload", None)
    if enable is None:
        pytest.skip("this diffusers has no group offloading")
    apply(sd.model, sd.checkpoint)
    expected = run(sd.model)
    enable(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(run(sd.model), expected)
    remove(sd.model)
