"""The speed benchmarks: small runs of each command, files of rows, and the tables of docs/speed.md."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import block, harness, hybrid, hybrid_fit, joint, joint_networks, paper_tables, run_all
from deltaconv_core import BlockSpec, bench
from deltaconv_core.bench import machine
from deltaconv_core.mixers.hybrid.flops import hybrid_flops
from scripts import speed_tables

REPOSITORY = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "COPIED", {"cpu": 2**20})
    monkeypatch.setattr(machine, "SIDE", {"cpu": 64})


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__file__, "--device", "cpu", *map(str, arguments)])
    assert module.main() == 0


# ---- what they share ----


def test_rows_are_kept_and_not_done_again(tmp_path):
    path, described = tmp_path / "rows.json", harness.circumstances()
    first = harness.Results(path, described)
    first.add({"size": (512, 768), "seconds": 1.5})
    again = harness.Results(path, described)
    assert again.find(size=(512, 768)) == {"size": [512, 768], "seconds": 1.5}
    assert again.find(size=(512, 512)) is None
    again.add({"size": (512, 512), "seconds": 1.0})
    assert json.loads(path.read_text()) == json.loads(json.dumps(described)) | {"rows": again.rows}
    assert [file.name for file in tmp_path.iterdir()] == ["rows.json"]


def test_figures_of_other_circumstances_are_not_mixed(tmp_path):
    harness.Results(tmp_path / "rows.json", {"torch": "1"}).add({"seconds": 1})
    with pytest.raises(SystemExit, match="other circumstances"):
        harness.Results(tmp_path / "rows.json", {"torch": "2"})


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("Intel(R) Xeon(R) Processor", "intel_xeon"),
        ("Intel(R) Core(TM) i7-9700K CPU @ 3.60GHz", "intel_core_i7_9700k"),
        ("AMD EPYC 9R14 96-Core Processor", "amd_epyc_9r14"),
        ("NVIDIA H100 80GB HBM3", "nvidia_h100_80gb_hbm3"),
    ],
)
def test_files_are_named_by_device(tmp_path, monkeypatch, name, slug):
    monkeypatch.setattr(bench, "device_name", lambda device: name)
    file = harness.result_file(tmp_path, "block backward", CPU, torch.bfloat16)
    assert file == tmp_path / f"block_{slug}_bfloat16.json"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
def test_peak_memory():
    def run():
        torch.ones(2**22)  # 16 MiB

    assert 14 * 2**20 < harness.peak(run, CPU) < 40 * 2**20


# ---- hybrid ----


def test_hybrids_beside_others(tmp_path, monkeypatch, capsys):
    path = tmp_path / "hybrid.json"
    options = ["--small", "--side", "64", "128", "--channels", "128", "--repeats", "1", "--json", path]
    run(hybrid, monkeypatch, *options)
    rows = json.loads(path.read_text())["rows"]
    assert [row["grid"] for row in rows] == [[8, 8], [16, 16]]
    for name, known in rows[1]["methods"].items():
        assert known["flops"] > 0 and ("seconds" in known) == (name != "ΔConv, triton")
    growing = dict(
        line.split("|")[1:5:3] for line in capsys.readouterr().out.splitlines() if "| hybrid" in line
    )
    assert len(growing) == len(hybrid.SPECS)
    monkeypatch.setattr(hybrid, "measure", None)  # whatever is in the file is not measured again
    run(hybrid, monkeypatch, *options)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
def test_what_converting_takes(monkeypatch, capsys):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(sys, "argv", ["hybrid_fit.py", "--small", "--pictures", "4", "--steps", "1"])
    monkeypatch.setattr(hybrid_fit, "MOST_PASSES", 10**6)
    assert hybrid_fit.main() == 0
    printed = capsys.readouterr().out
    assert "16 sites, 8 x 8, 4 pictures of 1 steps" in printed and "layers are replaced" in printed
    monkeypatch.setattr(hybrid_fit, "MOST_PASSES", 0)
    assert hybrid_fit.main() == 1


def test_flops_of_hybrids_are_those_that_are_counted():
    """Products alone: what the formula counts of the Cholesky solution, PyTorch's counter does not see."""
    for fields in hybrid.SPECS.values():
        layer = bench.Layer("", BlockSpec(128, 9), 2, (24, 40))
        made = hybrid.Hybrid(fields, layer, torch.device("meta"), torch.float32)
        x = torch.zeros(1, 960, 128, device="meta")
        counted = bench.count_flops(lambda made=made, x=x, layer=layer: made(x, layer.grid))
        assert counted == pytest.approx(hybrid_flops(made.mixer.spec, layer.grid), rel=0.2), fields


# ---- block ----


def test_joint_attentions_beside_mixers(tmp_path, monkeypatch, capsys):
    file = tmp_path / "joint.json"
    options = ["--small", "--repeats", 1, "--model", "flux", "--side", 32, 64, "--whole", 40, "--json", file]
    run(joint, monkeypatch, *options)
    whole, part = json.loads(file.read_text())["rows"]
    assert whole["timed_queries"] == whole["tokens"] == 8 + 4 * 4
    assert part["timed_queries"] == 40 and part["tokens"] == 8 + 8 * 8
    for form in joint.FORMS:
        ratio = part["seconds"]["attention"] / part["seconds"][form]
        assert part["ratio"][form] == pytest.approx(ratio)
    assert part["bytes"]["attention"] is None
    last = capsys.readouterr().out.splitlines()[-2:]
    assert [line.count("~") for line in last] == [2, 2]


def test_multiply_adds_of_a_network_of_text_and_image(comfy_host):
    from comfy.ldm.lumina.model import NextDiT

    config = {"dim": 64, "n_heads": 2, "axes_dims": [8, 12, 12], "cap_feat_dim": 16, "in_channels": 16}
    network = NextDiT(n_layers=3, n_refiner_layers=1, multiple_of=8, **config, **joint_networks._made())
    given = {"context": torch.empty(1, 5, 16, device="meta", dtype=torch.bfloat16), "num_tokens": 5}
    grid, image = (20, 30), 600
    counted = joint_networks.count(network, given, grid)
    joint_calls, alone, text = 3 * (image + 5) ** 2, image**2, 5**2
    assert counted.attention == 2 * 64 * (joint_calls + alone + text)
    assert counted.exact == counted.attention - 2 * 64 * 4 * image**2
    landmarks = 13 * 19  # at most 256, in the shape of the grid
    near = 4 * image * (landmarks * 2 + 81)
    assert counted.mixed == 64 * (near + 2 * 3 * 5 * (image + image + 5) + 2 * text)
    weights = sum(
        p.numel() for name, p in network.named_parameters() if name.startswith("layers.0.attention")
    )
    assert counted.rest > 3 * (image + 5) * weights
    lines = joint_networks.cells(counted)
    assert float(lines["bound"].split()[0]) >= float(lines["mixers"].split()[0])


def test_block(tmp_path, monkeypatch, capsys):
    path = tmp_path / "block.json"
    options = ["--small", "--preset", "sd15-512", "--repeats", "1", "--json", path]
    run(block, monkeypatch, *options)
    run(block, monkeypatch, *options, "--backward", "--only", "attention, flash", "ΔConv, torch")
    figures = json.loads(path.read_text())
    assert figures["dtype"] == "float32" and figures["small"] is True
    assert [row["backward"] for row in figures["rows"]] == [False, False, True, True]
    for row in figures["rows"]:
        assert row["bandwidth"] > 0 and row["rate"] > 0
        for name, known in row["methods"].items():
            if "skipped" in known:
                assert name in ("attention, efficient", "attention, cudnn", "ΔConv, triton")
            else:
                assert known["seconds"] > 0 and known["flops"] > 0 and known["bytes"] > 0
    whole, _, both, _ = figures["rows"]
    assert set(whole["methods"]) == set(block.METHODS)
    assert set(both["methods"]) == {"attention, flash", "ΔConv, torch"}
    for name, known in both["methods"].items():
        assert known["flops"] >= 3 * whole["methods"][name]["flops"]
    monkeypatch.setattr(block, "measure", None)  # whatever is in the file is not measured again
    capsys.readouterr()
    run(block, monkeypatch, *options)
    assert capsys.readouterr().out.count("| ΔConv, torch ") == 2


def test_what_would_take_too_long_is_not_run(monkeypatch, capsys):
    monkeypatch.setattr(bench, "alternate", lambda runs, *_: dict.fromkeys(runs))
    run(block, monkeypatch, "--small", "--preset", "paper", "--patience", "0")
    assert capsys.readouterr().out.count("would take about") == 2 * len(block.METHODS)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried ..."), "out of memory"),
        (RuntimeError("\ntoo many entries\nand so on"), "too many entries"),
        (RuntimeError(), "RuntimeError"),
    ],
    ids=["memory", "sentence", "nothing"],
)
@pytest.mark.parametrize("late", [False, True], ids=["at once", "in its turn"])
@pytest.mark.parametrize("backward", [False, True])
def test_a_method_that_fails_is_left_out(monkeypatch, error, reason, late, backward):
    """It passes the trial on a small grid; the others are measured."""
    layer = block.presets(small=True)["paper"][0]
    case = block.Case(layer, 1, backward, CPU, torch.float32)
    calls = []

    class Failing(bench.SelfAttention):
        def attend(self, q, k, v, grid):
            if grid == layer.grid and q.device == CPU:
                calls.append(grid)
                if len(calls) > late:
                    raise error
            return super().attend(q, k, v, grid)

    names = ["LinFusion", "attention, math", "ΔConv, torch"]
    made = block.Method(lambda layer, device, dtype: Failing(layer.spec.dim, layer.heads, device, dtype))
    monkeypatch.setitem(block.METHODS, "attention, math", made)
    figures = block.measure(case, names, 2, 60.0, (1e9, 1e12))
    assert figures["attention, math"]["skipped"] == reason and len(calls) == 1 + late
    assert all(figures[name]["seconds"] > 0 for name in names[::2])
    assert reason in block.table(figures)


def test_all_methods_share_the_tokens(monkeypatch):
    made, tokens = [], block.Case.tokens
    monkeypatch.setattr(block.Case, "tokens", lambda case: made.append(case) or tokens(case))
    layer = block.presets(small=True)["paper"][0]
    case = block.Case(layer, 1, False, CPU, torch.float32)
    block.measure(case, ["LinFusion", "ΔConv, torch"], 1, 60.0, (1e9, 1e12))
    assert made.count(case) == 1


def test_presets_hold_each_layer_once():
    found = block.presets()
    assert [(layer.spec.dim, layer.spec.kernel_size, layer.grid) for layer in found["sdxl-1024"]] == [
        (640, 9, (64, 64)), (1280, 7, (32, 32)), (1280, 9, (32, 32)), (640, 13, (64, 64)),
    ]  # fmt: skip
    assert len(found["pixart_sigma-512"]) == 1 and len(found["kernel"]) == 8
    small = [layer.grid for layers in block.presets(small=True).values() for layer in layers]
    assert max(map(max, small)) <= 16


# ---- the paper's tables ----


def test_the_papers_own_figures_come_out_of_its_formula():
    for picture, (_, attention, _, _) in paper_tables.TABLE_1.items():
        counted = paper_tables.operations(picture)
        assert counted["attention"] / 1e9 == pytest.approx(attention, abs=0.01)
        assert counted["ΔConv"] <= counted["step by step"]
        assert counted["counted"] > counted["attention"]


def test_tables(tmp_path, monkeypatch, capsys):
    path = tmp_path / "paper.json"
    run(paper_tables, monkeypatch, "--small", "--repeats", "1", "--json", path)
    out = capsys.readouterr().out
    assert "| attention, paper / ΔConv, paper | " in out and "6,929.04" in out
    rows = json.loads(path.read_text())["rows"]
    assert [row["table"] for row in rows] == [1, 1, 1, 1, 2, 2]
    assert all(row["lean"] < row["ΔConv"] for row in rows[:4])
    assert all(set(row["seconds"]) == {"attention", "LinFusion", "ΔConv"} for row in rows[4:])


def test_attention_that_takes_too_long_is_left_out(monkeypatch, capsys):
    run(paper_tables, monkeypatch, "--small", "--table", "2", "--repeats", "1", "--patience", "0")
    assert "- (1,077.98)" in capsys.readouterr().out


# ---- all of them ----


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("small", [False, True])
def test_every_command_is_one(tmp_path, monkeypatch, device, small):
    class Understood(Exception):
        pass

    def pick(name):
        raise Understood(name)

    monkeypatch.setattr(bench, "device_name", lambda device: "A device")
    lines = run_all.commands(torch.device(device), torch.float32, list(run_all.MODULES), small, tmp_path)
    assert len(lines) == len(run_all.ON_CPU if device == "cpu" else run_all.ON_GPU)
    monkeypatch.setattr(bench, "pick_device", pick)
    for line in lines:
        monkeypatch.setattr(sys, "argv", line[1:])
        with pytest.raises(Understood, match=device):
            importlib.import_module(line[1]).main()
        assert line[-1].startswith(str(tmp_path)) and line[-1].endswith("_a_device_float32.json")


def test_commands_are_shown(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(run_all.subprocess, "run", None)
    run(run_all, monkeypatch, "--show", "--only", "paper", "--folder", tmp_path)
    (line,) = capsys.readouterr().out.split("==> ")[1:]
    assert "-m benchmarks.paper_tables" in line and "--device cpu --dtype float32" in line


# ---- docs/speed.md ----

VARIANTS = {
    "ComfyUI's attention": {"skipped": "is PyTorch attention here"},
    "PyTorch attention": {"seconds": 3.0},
    "ΔConv": {"seconds": 1.02},
    "no self-attention": {"seconds": 1.0},
}


@pytest.fixture
def results(tmp_path):
    figures = {"gpu": "A card", "dtype": "float16", "torch": "2", "comfyui": "1"}
    row = {"architecture": "sd15", "size": [1024, 576], "variants": VARIANTS}
    skipped = {"architecture": "sdxl", "size": [512, 512], "skipped": "no memory"}
    path = tmp_path / "network_a_card_float16.json"
    path.write_text(json.dumps(figures | {"rows": [row, skipped]}))
    return tmp_path


def test_the_table_says_what_the_results_say(results):
    text = "\n".join(speed_tables.tables(results))
    (line,) = [line for line in text.splitlines() if line.startswith("| SD 1.5")]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == [
        "SD 1.5", "1024×576", "–", "3.00×", "–", "–", "–", "1.02×", "–",
    ]  # fmt: skip
    assert "A card" in text and "SDXL" not in text


def test_only_what_is_between_the_comments_changes(results):
    old = f"before\n{speed_tables.BEGIN}\nold\n{speed_tables.END}\nafter\n"
    new = speed_tables.with_tables(old, results)
    assert new.startswith("before\n") and new.endswith("\nafter\n") and "old" not in new
    assert speed_tables.with_tables(new, results) == new
    assert speed_tables.with_tables(new.replace("1.02×", "1.00×"), results) == new
    with pytest.raises(SystemExit, match="lacks the lines"):
        speed_tables.with_tables("no comments", results)


def test_the_page_is_what_the_results_say():
    text = (REPOSITORY / "docs" / "speed.md").read_text(encoding="utf-8")
    assert speed_tables.with_tables(text, REPOSITORY / "benchmarks" / "results") == text, (
        "run python -m scripts.speed_tables"
    )


def test_the_counted_operations_are_those_of_today():
    """They need no certain machine, so they must not be older than the code."""
    for file in (REPOSITORY / "benchmarks" / "results").glob("paper_*.json"):
        for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
            if row["table"] == 1:
                now = paper_tables.operations(row["picture"])
                assert {name: row[name] for name in now} == now, (
                    f"delete the rows of table 1 in {file.name} and run python -m benchmarks.paper_tables"
                )
