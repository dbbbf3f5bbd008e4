"""The start whose last layers are solved, on an attention that a block can be."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from deltaconv_core import BlockSpec, DeltaConvBlock
from deltaconv_core.distill.warm_start import random_start
from demo.study import ridge_start as module
from demo.study.ridge_start import features_of, ridge_start

FORMS = {"lean": BlockSpec.lean(8, 3), "released": BlockSpec(8, 3)}


def block_of(spec, seed):
    torch.manual_seed(seed)
    block = DeltaConvBlock(spec)
    random_start(block)
    return block.requires_grad_(False)


@pytest.mark.parametrize("spec", FORMS.values(), ids=FORMS)
def test_the_block_is_linear_in_what_its_last_layers_are_given(spec):
    block, x = block_of(spec, 0), torch.randn(2, 30, 8)
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    features = features_of(block, x, (5, 6))
    assert all(torch.equal(block.state_dict()[name], tensor) for name, tensor in before.items())
    bias = (block.conv_out.bias + block.conv_pool.bias)[:, None]
    layers = torch.cat([block.conv_out.weight.flatten(1), block.conv_pool.weight.flatten(1), bias], dim=1)
    torch.testing.assert_close(features @ layers.T, block(x, (5, 6)), rtol=1e-4, atol=1e-5)


def test_answers_that_the_layers_can_give_are_found(monkeypatch):
    """A teacher that is a block of the same first layers: all that is left comes from the ridge."""
    wanted, block = block_of(FORMS["lean"], 0), block_of(FORMS["lean"], 0)
    for layer in (block.conv_out, block.conv_pool):
        layer.weight.zero_()
        layer.bias.zero_()
    random = torch.Generator().manual_seed(1)

    class Teacher:
        network = SimpleNamespace(attentions={}, grids={})

        def batches(self, size, seed):
            return lambda number: torch.randn(size, 30, 8, generator=random)

    @contextmanager
    def tapped(attentions, mixers, grids):
        @contextmanager
        def mode(mixing, observe):
            Teacher.network = staticmethod(lambda x: observe("a", x, (5, 6), wanted(x, (5, 6))))
            yield

        yield SimpleNamespace(mode=mode)

    monkeypatch.setattr(module, "tapped", tapped)
    monkeypatch.setattr(module, "RIDGE", 1e-6)
    teacher = Teacher()
    teacher.network = lambda x: Teacher.network(x)
    teacher.network.attentions = teacher.network.grids = {}
    ridge_start(teacher, {"a": block})
    x = torch.randn(2, 30, 8)
    torch.testing.assert_close(block(x, (5, 6)), wanted(x, (5, 6)), rtol=1e-2, atol=1e-3)
