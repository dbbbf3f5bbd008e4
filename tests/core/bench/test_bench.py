"""Measuring: what is timed and how often, what is counted, and what the command prints."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from deltaconv_core import BlockSpec, Checkpoint, DeltaConvBlock, DeltaConvError, bench, save_checkpoint
from deltaconv_core.bench import layers as layers_module
from deltaconv_core.bench import timing
from deltaconv_core.block.flops import attention_flops, block_flops
from deltaconv_core.cli import main
from deltaconv_core.sites import ARCHITECTURES, authors_specs, known_heads

CPU, META = torch.device("cpu"), torch.device("meta")


# ---- time ----


def test_runs_take_turns_and_the_first_of_each_does_not_count():
    seen = []
    times = bench.alternate(
        {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, CPU, 3, check=lambda: seen.append("?")
    )
    assert seen == ["?", "a", "?", "b"] * 4
    assert {name: len(taken) for name, taken in times.items()} == {"a": 3, "b": 3}
    assert all(seconds > 0 for taken in times.values() for seconds in taken)


def test_a_span_measures_what_is_in_it():
    x = torch.randn(300, 300)
    with bench.Span(CPU) as short:
        x @ x
    with bench.Span(CPU) as long:
        for _ in range(300):
            x @ x
    assert 0 < short.seconds < long.seconds


class Gpu:
    """Stands for torch.cuda of a machine with two GPUs, the first of which is the current one."""

    def __init__(self, monkeypatch):
        self.now, self.current, self.seen, gpu = 0, 0, [], self

        class Event:
            def __init__(self, enable_timing):
                pass

            def record(self, stream):
                gpu.seen.append(("record", stream))

            def synchronize(self):
                pass

            def elapsed_time(self, other):
                return 1.0

        class Current:
            def __init__(self, device):
                self.device = device

            def __enter__(self):
                gpu.current = self.device.index

            def __exit__(self, *_):
                gpu.current = 0

        def sleep(cycles):
            gpu.seen.append(("sleep", gpu.current, round(1000 * cycles / timing.CYCLES, 3)))

        for name, stand_in in {
            "Event": Event,
            "device": Current,
            "_sleep": sleep,
            "current_stream": lambda device: device.index,
            "synchronize": lambda device: gpu.seen.append(("wait", device.index)),
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(timing.torch, "empty", lambda *_, device, **__: torch.zeros(1))
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.now))


def test_a_gpu_that_is_not_the_current_one(monkeypatch):
    gpu, second = Gpu(monkeypatch), torch.device("cuda", 1)
    bench.synchronize(second)
    assert gpu.seen == [("wait", 1)]
    gpu.seen.clear()
    assert bench.alternate({"a": lambda: None}, second, 1) == {"a": [0.001]}
    assert gpu.seen == [("sleep", 1, 2.5), ("record", 1), ("record", 1)] * 2


def test_a_gpu_is_busy_until_the_host_has_queued_a_run(monkeypatch):
    gpu, seconds = Gpu(monkeypatch), iter((9.0, 0.01, 0.0, 0.0))

    def run():
        gpu.now += next(seconds)

    bench.alternate({"a": run}, torch.device("cuda", 0), 3)
    assert [entry[2] for entry in gpu.seen if entry[0] == "sleep"] == [2.5, 100, 20, 2.5]


# ---- operations ----


@pytest.mark.parametrize(("grid", "channels", "heads"), [((8, 8), 32, 2), ((5, 7), 48, 3), ((1, 1), 16, 1)])
def test_attention_is_counted_in_its_plain_form(grid, channels, heads):
    tokens = grid[0] * grid[1]
    for device in (CPU, META):
        mixer = bench.SelfAttention(channels, heads, device)
        x = torch.empty(2, tokens, channels, device=device)
        assert bench.count_flops(partial(mixer, x, grid)) == 2 * attention_flops(tokens, channels)


@pytest.mark.parametrize("grid", [(8, 8), (5, 7)])
def test_blocks_are_counted(grid):
    spec = BlockSpec(32, 5, scales=(1.0,))
    block = DeltaConvBlock(spec, META)
    x = torch.empty(1, grid[0] * grid[1], 32, device=META)
    assert bench.count_flops(lambda: block(x, grid)) == block_flops(spec, grid)


def test_any_size_can_be_counted():
    layer = bench.Layer("up_blocks.3", BlockSpec(640, 9), 10, (1080, 1920), sites=2)
    cost = bench.layer_cost(layer, 3, 2.0, 1.0)
    assert cost.attention_flops == 2 * 3 * attention_flops(1080 * 1920, 640)
    assert 0 < cost.block_flops <= 2 * 3 * block_flops(layer.spec, layer.grid)


def test_self_attention_is_that_of_its_formula():
    torch.manual_seed(0)
    mixer = bench.SelfAttention(12, 3)
    x = torch.randn(2, 10, 12)
    q, k, v = (layer(x).unflatten(2, (3, 4)) for layer in (mixer.to_q, mixer.to_k, mixer.to_v))
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / 2).softmax(dim=-1)
    expected = mixer.to_out(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))
    assert torch.allclose(mixer(x, (2, 5)), expected, atol=1e-6)


# ---- layers ----


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_site_is_in_one_layer(architecture):
    found = bench.layers_of(architecture, (64, 64))
    widths = Counter({})
    for layer in found:
        widths[layer.spec] += layer.sites
        assert layer.spec.dim % layer.heads == 0
    assert widths == Counter(authors_specs(architecture).values())
    assert len(found) == len({layer.part for layer in found})


@pytest.mark.parametrize(
    ("architecture", "latent", "grids"),
    [
        ("sd15", (64, 96), {"down_blocks.0": (64, 96), "down_blocks.2": (16, 24), "mid_block": (8, 12)}),
        ("sd15", (33, 27), {"down_blocks.1": (17, 14), "mid_block": (5, 4), "up_blocks.3": (33, 27)}),
        ("sdxl", (128, 128), {"down_blocks.1": (64, 64), "mid_block": (32, 32), "up_blocks.0": (32, 32)}),
        ("pixart_sigma", (64, 48), {"transformer_blocks": (32, 24)}),
    ],
)
def test_grids(architecture, latent, grids):
    found = {layer.part: layer.grid for layer in bench.layers_of(architecture, latent)}
    assert found | grids == found


def test_heads():
    found = {name: known_heads(name, 640) for name in ("sd15", "sdxl")}
    assert found == {"sd15": 8, "sdxl": 10} and known_heads("pixart_sigma", 1152) == 16


def test_an_unknown_architecture_is_refused():
    with pytest.raises(DeltaConvError, match=r"unet-64x2.*known are sd15.*ΔConv Benchmark"):
        bench.layers_of("unet-64x2", (8, 8))


def test_equal_layers_are_measured_once(monkeypatch):
    measured = []

    def alternate(runs, device, repeats, check):
        measured.append(list(runs))
        return {"attention": [3.0, 1.0, 2.0], "ΔConv": [0.5, 0.5, 0.5]}

    monkeypatch.setattr(layers_module, "alternate", alternate)
    spec = BlockSpec(16, 3)
    layers = [bench.Layer("down", spec, 2, (4, 4), 2), bench.Layer("up", spec, 2, (4, 4), 3)]
    down, up = bench.measure_layers(layers, 1, CPU, torch.float32, 3)
    assert len(measured) == 1
    assert (down.part, down.attention_seconds, down.block_seconds) == ("down", 4.0, 1.0)
    assert (up.part, up.sites, up.attention_seconds) == ("up", 3, 6.0)
    assert up.attention_flops * 2 == down.attention_flops * 3
    table = bench.layer_table([down, up]).splitlines()
    assert [cell.strip() for cell in table[-1].split("|")[1:9]] == [
        "all", "5", "", "", "", "10,000.00", "2,500.00", "4",
    ]  # fmt: skip


def test_seconds_are_measured():
    (cost,) = bench.measure_layers(bench.layers_of("sd15", (2, 2))[:1], 1, CPU, torch.float32, 1)
    assert cost.attention_seconds > 0 and cost.block_seconds > 0


# ---- sizes and machines ----


def test_sizes():
    assert bench.parse_size("768") == (768, 768) and bench.parse_size("1024x576") == (1024, 576)
    assert bench.latent_of((1024, 576)) == (72, 128)


@pytest.mark.parametrize("text", ["", "0", "-512", "500", "1024x", "x512", "512x520", "512 x 512", "5e2"])
def test_other_sizes_are_refused(text):
    with pytest.raises(DeltaConvError, match="multiples of 16"):
        bench.parse_size(text)


def test_devices_and_dtypes():
    assert bench.pick_device("cpu") == CPU
    with pytest.raises(DeltaConvError, match="'toaster'"):
        bench.pick_device("toaster")
    assert bench.pick_dtype(None, CPU) == torch.float32
    assert bench.pick_dtype(None, torch.device("cuda")) == torch.float16
    with pytest.raises(DeltaConvError, match="float16 on a CPU"):
        bench.pick_dtype("float16", CPU)


def test_rates(monkeypatch):
    monkeypatch.setattr(bench.machine, "COPIED", {"cpu": 2**20})
    monkeypatch.setattr(bench.machine, "SIDE", {"cpu": 64})
    assert 1e7 < bench.copy_bandwidth(CPU) < 1e13
    assert 1e6 < bench.matmul_rate(CPU, torch.float32) < 1e15


# ---- the command ----


def test_the_command(tmp_path, capsys):
    path = tmp_path / "figures.json"
    assert main(["bench", "--size", "32x48", "--repeats", "1", "--device", "cpu", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("sd15, 32 x 48, batch 1, float32; ") and "| up_blocks.3 " in out
    figures = json.loads(path.read_text())
    assert figures["size"] == [32, 48] and figures["torch"] == torch.__version__
    assert sum(row["sites"] for row in figures["rows"]) == 16
    assert figures["rows"][0]["grid"] == [6, 4]


def test_the_blocks_of_a_file(tmp_path, capsys):
    site = "transformer_blocks.3.attn1"
    blocks = {site: DeltaConvBlock(BlockSpec(1152, 5, gate="sigmoid"))}
    save_checkpoint(Checkpoint("pixart_sigma", blocks), tmp_path / "w.safetensors")
    assert main(["bench", str(tmp_path / "w.safetensors"), "--size", "32", "--repeats", "1"]) == 0
    row = capsys.readouterr().out.splitlines()[4]
    assert [cell.strip() for cell in row.split("|")[1:6]] == ["transformer_blocks", "1", "2x2", "1152", "5"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "500"], "multiples of 16"),
        (["--batch", "0"], "--batch to be at least 1"),
        (["--repeats", "0"], "--repeats to be at least 1"),
        (["--device", "toaster"], "toaster"),
        (["--device", "cpu", "--dtype", "float16"], "float16 on a CPU"),
        (["missing.safetensors"], "missing.safetensors"),
    ],
)
def test_bad_input(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
