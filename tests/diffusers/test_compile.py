"""torch.compile over ΔConv: one graph, and no stale ones."""

from __future__ import annotations

import diffusers
import pytest
import torch
from tiny_models import CONTEXT_DIM, call, make, make_checkpoint, relative_error

from deltaconv_core.diffusers import apply, remove

CROSS, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def smallest(kind):
    """One level only; tracing is what takes long here."""
    if kind == "pixart":
        return make("pixart")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(16,), down_block_types=(CROSS,), up_block_types=(CROSS_UP,), layers_per_block=1,
        norm_num_groups=4, cross_attention_dim=CONTEXT_DIM, attention_head_dim=4,
    ).eval()  # fmt: skip


@torch.no_grad()
def run(model, size=(8, 6), timestep=500):
    x = torch.linspace(-1, 1, 4 * size[0] * size[1]).view(1, 4, *size)
    return call(model, x, torch.linspace(-1, 1, 80).view(1, 5, CONTEXT_DIM), timestep)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unet", "pixart"])
def test_whole_range_is_one_graph(kind):
    model = smallest(kind)
    apply(model, make_checkpoint(model))
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    for size in ((8, 6), (6, 8)):
        assert relative_error(run(compiled, size), run(model, size)) < 1e-5


@pytest.mark.parametrize(
    "compile", [lambda model: torch.compile(model, backend="eager"), lambda model: model]
)
@pytest.mark.slow
def test_a_model_that_was_compiled_first(compile):
    """Both the wrapper that torch.compile makes, and a model compiled in its place."""
    model = smallest("unet")
    plain = run(model)
    checkpoint = make_checkpoint(model)
    user = compile(model)
    if user is model:
        model.compile(backend="eager")
    run(user)
    apply(user, checkpoint)
    patched = run(user)
    assert relative_error(patched, plain) > 1e-3
    remove(user)
    assert relative_error(run(user), plain) < 1e-5
    apply(user, checkpoint, end_percent=0.5)
    assert relative_error(run(user, timestep=800), run(model, timestep=800)) < 1e-5


@pytest.mark.slow
def test_a_range_takes_one_side_or_the_other():
    whole, part, bare = smallest("unet"), smallest("unet"), smallest("unet")
    checkpoint = make_checkpoint(bare)
    apply(whole, checkpoint)
    apply(part, checkpoint, end_percent=0.5)
    compiled = torch.compile(part, backend="eager")
    for timestep in (800, 200, 700):
        timestep = torch.tensor(timestep)
        expected = run(whole if timestep > 500 else bare, timestep=timestep)
        assert relative_error(run(compiled, timestep=timestep), expected) < 1e-5


def test_a_compiled_block():
    """What diffusers calls regional compilation."""
    model = smallest("pixart")
    checkpoint = make_checkpoint(model)
    apply(model, checkpoint)
    expected = [run(model, size) for size in ((8, 6), (6, 8))]
    model.transformer_blocks[1].compile(backend="eager", fullgraph=True)
    for size, output in zip(((8, 6), (6, 8)), expected, strict=True):
        assert relative_error(run(model, size), output) < 1e-5
