"""torch.compile over ΔConv: one graph, and no stale ones."""

from __future__ import annotations

import diffusers
import pytest
import torch

from deltaconv_core.diffusers import apply, remove
from deltaconv_core.diffusers.sites import find_sites, network_of
from deltaconv_core.errors import DeltaConvError
from testing.compare import largest_error
from testing.diffusers_models import CONTEXT_DIM, call, make, make_checkpoint

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
        assert largest_error(run(compiled, size), run(model, size)) < 1e-5


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
    assert largest_error(patched, plain) > 1e-3
    remove(user)
    assert largest_error(run(user), plain) < 1e-5
    apply(user, checkpoint, end_percent=0.5)
    assert largest_error(run(user, timestep=800), run(model, timestep=800)) < 1e-5


def test_wrappers_around_the_network_and_its_parts():
    """Around a stack, and around single blocks of it, too."""
    for kind in ("unet", "pixart"):
        model = smallest(kind)
        checkpoint = make_checkpoint(model)
        plain = run(model)
        apply(model, checkpoint)
        patched = run(model)
        remove(model)
        stacks = [(n, m) for n, m in model.named_modules() if hasattr(m, "transformer_blocks")]
        for name, stack in stacks:
            for number, block in enumerate(stack.transformer_blocks):
                stack.transformer_blocks[number] = torch.compile(block, backend="eager")
            if name:
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, torch.compile(stack, backend="eager"))
        user = torch.compile(model, backend="eager")
        apply(user, checkpoint)
        assert largest_error(run(user), patched) < 1e-5
        remove(user)
        assert largest_error(run(user), plain) < 1e-5


def test_a_model_for_several_processes(tmp_path):
    model = smallest("unet")
    checkpoint = make_checkpoint(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        apply(parallel, checkpoint)
        assert "deltaconv" in dict(model.named_children())
        x, text = torch.zeros(1, 4, 8, 6), torch.zeros(1, 5, CONTEXT_DIM)
        assert torch.equal(parallel(x, 500, text).sample, model(x, 500, text).sample)
        remove(parallel)
        assert find_sites(network_of(parallel)).attentions == find_sites(model).attentions
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["unet", "pixart"])
def test_a_network_inside_of_something_else_is_named(kind):
    model = smallest(kind)
    around = torch.nn.ModuleDict({"base": torch.nn.ModuleDict({"model": model})})
    with pytest.raises(
        DeltaConvError, match=r"stands inside this model \(ModuleDict\), as its base\.model; give"
    ):
        apply(around, make_checkpoint(model))


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
        assert largest_error(run(compiled, timestep=timestep), expected) < 1e-5


def test_a_compiled_block():
    """What diffusers calls regional compilation."""
    model = smallest("pixart")
    checkpoint = make_checkpoint(model)
    apply(model, checkpoint)
    expected = [run(model, size) for size in ((8, 6), (6, 8))]
    model.transformer_blocks[1].compile(backend="eager", fullgraph=True)
    for size, output in zip(((8, 6), (6, 8)), expected, strict=True):
        assert largest_error(run(model, size), output) < 1e-5
