"""How a block's layers in ComfyUI lend their weights: as their own forward would use them."""

from __future__ import annotations

import contextlib
from importlib import import_module

import pytest
import torch

from testing.compare import relative_l2


@pytest.fixture
def forwards(pack):
    return import_module(".nodes.host.patch.forwards", pack.__name__)


@pytest.fixture
def core(pack):
    return import_module(".deltaconv_core", pack.__name__)


@pytest.fixture(params=["Linear", "Conv2d"])
def layer(forwards, request):
    torch.manual_seed(0)
    if request.param == "Linear":
        made = forwards.Layers.Linear(6, 4, dtype=torch.bfloat16)
    else:
        made = forwards.Layers.Conv2d(4, 4, 3, groups=4, bias=False, dtype=torch.bfloat16)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def lent(layer, x):
    with layer.lend_weights(x) as (weight, bias):
        return weight, bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_the_dtype_of_the_input(layer, dtype):
    weight, bias = lent(layer, torch.zeros(1, dtype=dtype))
    assert weight.dtype == dtype and torch.equal(weight, layer.weight.to(dtype))
    assert (bias is None) == (layer.bias is None)
    assert bias is None or torch.equal(bias, layer.bias.to(dtype))


def test_with_the_patches_that_are_applied_at_each_call(layer):
    """Where memory is short, ComfyUI puts LoRAs onto weights as they are used."""
    layer.weight_function = [lambda weight: weight + 1, lambda weight: weight * 2]
    weight, _ = lent(layer, torch.zeros(1))
    torch.testing.assert_close(weight, (layer.weight.float() + 1) * 2)


@pytest.mark.parametrize("fails", [False, True])
def test_weights_are_given_back(forwards, layer, monkeypatch, fails):
    import comfy.ops

    if not forwards.TAKES_WEIGHTS_BACK:
        pytest.skip("this ComfyUI does not ask for them")
    returned = []
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", lambda *given: returned.append(given))
    raised = pytest.raises(MemoryError) if fails else contextlib.nullcontext()
    with raised, layer.lend_weights(torch.zeros(1)):
        assert not returned
        if fails:
            raise MemoryError
    assert len(returned) == 1 and returned[0][0] is layer


def test_the_signature_of_older_versions(forwards, layer, monkeypatch):
    import comfy.ops

    monkeypatch.setattr(forwards, "TAKES_WEIGHTS_BACK", False)
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", lambda layer, x: (layer.weight.to(x), None))
    monkeypatch.delattr(comfy.ops, "uncast_bias_weight", raising=False)
    monkeypatch.delattr(comfy.ops, "run_every_op", raising=False)
    assert torch.equal(lent(layer, torch.zeros(1))[0], layer.weight.float())


def test_interruption_is_noticed(layer):
    import comfy.model_management as management

    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        lent(layer, torch.zeros(1))


def test_gradients_reach_weights_and_tokens(core, forwards):
    torch.manual_seed(0)
    plain = core.DeltaConvBlock(core.BlockSpec(16, 5))
    hosted = core.DeltaConvBlock(plain.spec, operations=forwards.Layers)
    hosted.load_state_dict(plain.state_dict())
    x = torch.randn(2, 35, 16, requires_grad=True)
    grads = []
    for block in (plain, hosted):
        y = block(x, (7, 5))
        grads.append(torch.autograd.grad(y.square().sum(), [x, *block.parameters()]))
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_castable_layers_that_lend_nothing_are_called(core, forwards, dtype):
    import comfy.ops

    torch.manual_seed(0)
    plain = core.DeltaConvBlock(core.BlockSpec(16, 5), dtype=dtype)
    x = torch.randn(2, 35, 16).to(dtype)
    results = []
    for layers in (forwards.Layers, comfy.ops.manual_cast):
        hosted = core.DeltaConvBlock(plain.spec, operations=layers)
        hosted.load_state_dict(plain.state_dict())
        with torch.no_grad():
            results.append(hosted(x, (7, 5)).float())
    difference = relative_l2(results[1], results[0])
    assert difference < 2 * torch.finfo(dtype).eps


def test_one_graph_with_torch_compile(core, forwards):
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = core.DeltaConvBlock(core.BlockSpec(16, 5))
    hosted = core.DeltaConvBlock(plain.spec, operations=forwards.Layers)
    hosted.load_state_dict(plain.state_dict())
    compiled = torch.compile(hosted, backend="eager")
    x = torch.randn(2, 35, 16)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, (7, 5)), plain(x, (7, 5)))
