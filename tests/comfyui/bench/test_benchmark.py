"""ΔConv Benchmark and the benchmark of whole networks, on small MODELs."""

from __future__ import annotations

import pytest
import torch

from benchmarks import network
from testing.comfy_models import (
    in_pack,
    make_checkpoint,
    make_pixart,
    make_unet,
    patch,
    untouched,
    wrapped_by_compile,
)


def measure(pack, model, checkpoint=None, size=(128, 96), batch=2, repeats=2):
    """What the node's host code returns, run as ComfyUI's executor runs it."""
    host = in_pack(pack, "nodes.host.bench.measure")
    with torch.inference_mode():
        return host.measure(model, checkpoint, host.MeasureSettings(*size, batch, repeats))


def run_node(pack, model, deltaconv=None, size=(128, 96)):
    node = in_pack(pack, "nodes.benchmark").Benchmark
    with torch.inference_mode():
        return node.execute(model, *size, batch_size=1, repeats=1, deltaconv=deltaconv)


# ---- the node ----


def test_the_node(pack, unet):
    output = run_node(pack, unet)
    model, table = output.args
    assert model is unet
    assert table.startswith("unet-32x2-64x3, 128 × 96, batch 1, float32, ")
    assert "untrained lean blocks" in table and "| down_blocks.0 " in table and "| all " in table
    assert "times as fast" in table and "takes" in table


def test_a_network_that_another_node_compiled(pack, unet):
    measured = measure(pack, wrapped_by_compile(unet), repeats=1)
    assert measured.unseen == [] and len(measured.costs) == 5


def test_stages(pack, unet):
    measured = measure(pack, unet)
    stages = {cost.part: (cost.sites, cost.grid, cost.channels) for cost in measured.costs}
    assert stages == {
        "down_blocks.0": (1, (12, 16), 32),
        "down_blocks.1": (1, (6, 8), 64),
        "mid_block": (1, (6, 8), 64),
        "up_blocks.0": (1, (6, 8), 64),
        "up_blocks.1": (1, (12, 16), 32),
    }
    core = in_pack(pack, "deltaconv_core.block.flops")
    for cost in measured.costs:
        tokens = cost.grid[0] * cost.grid[1]
        assert cost.attention_flops == 2 * core.attention_flops(tokens, cost.channels)
        assert cost.attention_seconds > 0 and cost.block_seconds > 0
    assert set(measured.passes) == {"attention", "ΔConv", "nothing"} and not measured.unseen
    parts = sum(cost.attention_seconds for cost in measured.costs)
    assert parts < measured.passes["attention"]


def test_pixart(pack, pixart):
    measured = measure(pack, pixart, size=(512, 384), batch=1, repeats=1)
    (cost,) = measured.costs
    assert (cost.part, cost.sites, cost.grid) == ("transformer_blocks", 2, (24, 32))


@pytest.mark.parametrize("on_the_model", [False, True])
def test_trained_blocks(pack, unet, checkpoint, on_the_model):
    del checkpoint.blocks["mid_block.attentions.0.transformer_blocks.0.attn1"]
    model = patch(pack, unet, checkpoint, "all,-mid") if on_the_model else unet
    measured = measure(pack, model, None if on_the_model else checkpoint, repeats=1)
    assert measured.blocks == ("the blocks on this MODEL" if on_the_model else "the connected weights")
    assert [cost.kernel_size for cost in measured.costs] == [3] * 4


def test_blocks_of_another_model_are_refused(pack, unet, pixart):
    with pytest.raises(ValueError, match="weights are for"):
        measure(pack, pixart, make_checkpoint(pack, unet))


def test_what_runs_in_a_pass(pack, unet, monkeypatch):
    """Attention, ΔConv and nothing, by turns: read off the forwards that stand at the sites meanwhile."""
    host, passes = in_pack(pack, "nodes.host.bench.measure"), in_pack(pack, "nodes.host.bench.passes")
    site = next(iter(in_pack(pack, "nodes.host.model.sites").find_sites(unet).sites.values()))
    outputs = []

    def one_pass(model, given):
        outputs.append(forward_at(model, site, given))
        return passes.one_pass(model, given)

    monkeypatch.setattr(host, "one_pass", one_pass)
    measure(pack, unet, make_checkpoint(pack, unet), repeats=1)
    attention, deltaconv, nothing = outputs[:3]
    assert [torch.equal(a, b) for a, b in zip(outputs[3:], outputs[:3], strict=True)] == [True] * 3
    assert not torch.equal(attention, deltaconv) and not torch.equal(attention, nothing)
    assert torch.equal(nothing, torch.ones_like(nothing))


def forward_at(model, site, given):
    """What stands at the site makes of ones."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    module = model.get_model_object(site.path)
    x = torch.ones(1, 12, site.channels)
    return module.forward(x, transformer_options={"activations_shape": [1, site.channels, 3, 4]})


@pytest.mark.parametrize(("make", "size"), [(make_unet, (16, 12)), (make_pixart, (64, 48))])
def test_nothing_is_left_behind(pack, make, size):
    model = make()
    with untouched(model, size):
        measure(pack, model, size=(8 * size[1], 8 * size[0]), repeats=1)


def test_progress_and_interruption(pack, unet, monkeypatch):
    import comfy.model_management
    import comfy.utils

    seen = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: seen.append((value, total))
    )
    measure(pack, unet, repeats=1)
    assert seen[-1] == (6, 6)

    def interrupted():
        raise comfy.model_management.InterruptProcessingException()

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", interrupted)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        measure(pack, unet)
    for module in unet.model.modules():
        own = type(module).forward.__get__(module)
        assert module.__dict__.get("forward", own) == own


def test_out_of_memory_is_said(pack, unet, monkeypatch):
    import comfy.model_management

    def full(model, given):
        raise comfy.model_management.OOM_EXCEPTION("full")

    monkeypatch.setattr(in_pack(pack, "nodes.host.bench.measure"), "one_pass", full)
    with pytest.raises(ValueError, match=r"out of memory in a pass with attention at 128 x 96, batch 2"):
        measure(pack, unet)


def test_a_model_without_sites_is_refused(pack):
    model = make_unet(transformer_depth=[0, 0], transformer_depth_output=[0] * 4, transformer_depth_middle=-1)
    with pytest.raises(ValueError, match="no self-attention"):
        measure(pack, model)


def test_replaced_attention_is_reported(pack, unet):
    clone = unet.clone()
    clone.set_model_attn1_replace(lambda q, k, v, options: q, "middle", 0)
    measured = measure(pack, clone, repeats=1)
    assert measured.unseen == ["mid_block.attentions.0.transformer_blocks.0.attn1"]
    assert len(measured.costs) == 4
    report = in_pack(pack, "nodes.benchmark")._report(measured)
    assert "1 self-attentions were not called" in report.text


@pytest.mark.parametrize(("own", "words"), [(0.5, "ΔConv saves 50%"), (1.1, "saves no time at this size")])
def test_what_is_said(pack, own, words):
    host, node = in_pack(pack, "nodes.host.bench.measure"), in_pack(pack, "nodes.benchmark")
    measured = host.Measured("sd15", [], {"attention": 1.0, "ΔConv": own, "nothing": 0.4}, "blocks", [])
    text = node._report(measured).text
    assert "Self-attention takes 60% of a pass" in text and words in text


def test_passes_that_differ_by_noise_only(pack):
    host, node = in_pack(pack, "nodes.host.bench.measure"), in_pack(pack, "nodes.benchmark")
    measured = host.Measured("sd15", [], {"attention": 1.0, "ΔConv": 1.2, "nothing": 1.1}, "blocks", [])
    text = node._report(measured).text
    assert "noise" in text and "takes" not in text


def test_a_size_that_would_take_hours(pack, unet):
    with pytest.raises(ValueError, match=r"4096 x 2048 pixels are 512 x 256 positions.*smaller picture"):
        measure(pack, unet, size=(4096, 2048))


# ---- whole networks ----


def job(name, **changes):
    rows, columns = network.ARCHITECTURES[name].latents[0]
    values = {
        "architecture": name,
        "size": (8 * columns, 8 * rows),
        "batch": 1,
        "device": "cpu",
        "dtype": "float32",
        "small": True,
        "repeats": 1,
        "variants": network.VARIANTS,
        "predicted": {},
        "patience": 1800.0,
    }
    return network.Job(**values | changes)


@pytest.mark.parametrize(
    ("name", "skipped"),
    [("sd15", {"ComfyUI's attention"}), ("pixart_sigma", {"ComfyUI's attention", "HyperTile", "ToMe"})],
)
def test_networks(pack, name, skipped):
    found = network.measure(job(name))
    assert found["picked"] == "attention_pytorch"
    variants = found["variants"]
    assert list(variants) == list(network.VARIANTS)
    assert {variant for variant, known in variants.items() if "skipped" in known} == skipped
    for known in variants.values():
        assert "skipped" in known or (known["seconds"] > 0 and len(known["times"]) == 1)
    text = network.table({"architecture": name, "size": [1, 2], "batch": 1} | found)
    assert text.count("\n| ") == 2 + len(network.VARIANTS)


@pytest.mark.parametrize("late", [False, True], ids=["at once", "in its turn"])
def test_a_variant_that_fails_is_left_out(pack, monkeypatch, late):
    calls, one_pass = [], network.Host.one_pass

    def failing(host, name):
        calls.append(name)
        if name == network.DELTACONV and calls.count(name) > late:
            raise RuntimeError("too many entries\nand so on")
        return one_pass(host, name)

    monkeypatch.setattr(network.Host, "one_pass", failing)
    variants = (network.PYTORCH, network.DELTACONV, network.NOTHING)
    found = network.measure(job("pixart_sigma", variants=variants, repeats=2))["variants"]
    assert (
        found[network.DELTACONV]["skipped"] == "too many entries"
        and calls.count(network.DELTACONV) == 1 + late
    )
    assert all(len(found[name]["times"]) == 2 for name in variants[::2])


def test_turns_end_with_the_patience(pack):
    one = job("pixart_sigma", variants=(network.PYTORCH, network.NOTHING), repeats=3, patience=0.0)
    assert {len(known["times"]) for known in network.measure(one)["variants"].values()} == {1}


def test_variants_differ(pack):
    """Every variant computes something of its own; HyperTile needs more than one tile."""
    host = network.Host(pack.__name__, job("sd15", size=(512, 512)))
    outputs = {}
    with torch.inference_mode():
        for name in network.VARIANTS[1:]:
            torch.manual_seed(0)
            host.made[name] = host.make(name)
            outputs[name] = output(host, host.made[name])
    names = list(outputs)
    for i, name in enumerate(names):
        for other in names[i + 1 :]:
            assert not torch.equal(outputs[name], outputs[other]), (name, other)


def output(host, model):
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    given, calls = host.given, host.module("nodes.host.model.sampler_call")
    options = calls.sampler_options(model)["transformer_options"]
    return model.model.apply_model(given.latent, given.sigma, **given.conditions, transformer_options=options)


def test_the_attention_function_is_put_back():
    import comfy.ldm.modules.attention as attention
    import comfy.ldm.pixart.blocks as blocks

    before = (attention.optimized_attention, attention.optimized_attention_masked, blocks.optimized_attention)
    with network.attention_is(attention.attention_basic):
        assert attention.optimized_attention is attention.attention_basic
        assert blocks.optimized_attention is attention.attention_basic
    assert before == (
        attention.optimized_attention,
        attention.optimized_attention_masked,
        blocks.optimized_attention,
    )


def test_hopeless_variants_are_left_out(pack):
    one = job("pixart_sigma", predicted={"PyTorch attention": 2000.0}, variants=("PyTorch attention",))
    skipped = {"PyTorch attention": {"skipped": "would take up to 2,000 s"}}
    assert network.measure(one)["variants"] == skipped
    known = {"ToMe": {"seconds": 2.0}, "ΔConv": {"seconds": 1.0}}
    rows = [
        {"architecture": "sd15", "batch": 1, "size": [512, 512], "variants": known | skipped},
        {"architecture": "sd15", "batch": 1, "size": [768, 768], "skipped": "memory"},
        {"architecture": "sdxl", "batch": 1, "size": [512, 512], "variants": {"LinFusion": known["ΔConv"]}},
    ]  # fmt: skip
    key = {"architecture": "sd15", "size": (1024, 1024), "batch": 1}
    assert network.predict(rows, key) == {"ToMe": 32.0, "ΔConv": 4.0}


def test_a_process_that_is_ended_is_a_row(monkeypatch):
    class Pool:
        def __init__(self, *_, **__):
            pass

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731

        def submit(self, *_):
            raise network.BrokenProcessPool

    monkeypatch.setattr(network, "ProcessPoolExecutor", Pool)
    row = {"architecture": "sd15", "size": [512, 512], "batch": 1} | network.apart(job("sd15"))
    assert "want of memory" in network.table(row)
