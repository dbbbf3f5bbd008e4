"""`python -m deltaconv_core distill`: runs that end well, runs that resume, and what is refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deltaconv_core
from deltaconv_core import load_checkpoint
from deltaconv_core.diffusers import apply
from deltaconv_core.diffusers.distill.options import Options
from deltaconv_core.diffusers.distill.parse import MORE, OPTIONS, flag, read_options
from deltaconv_core.diffusers.sites import find_sites
from deltaconv_core.distill.fields import PARTS, About, default_text
from testing.diffusers_models import CONTEXT_DIM
from testing.distill_command import (
    QUICK,
    arguments,
    distil,
    draw,
    environment,
    last_error,
    same,
    save_pipeline,
    start,
    weights,
)

KINDS = ("sd", "xl", "pixart")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folders with a model of each kind, pictures, and a cache."""
    folder = tmp_path_factory.mktemp("files")
    made = {kind: save_pipeline(kind, folder / kind) for kind in KINDS}
    return made | {"data": draw(folder / "data"), "cache": folder / "cache"}


@pytest.fixture
def run(files, tmp_path):
    """Runs the command on the "sd" model; gives the exit status."""

    def go(kind="sd", output="run", **options):
        where = {"model": files[kind], "data": files["data"], "cache": files["cache"]}
        return distil(**where | {"output": tmp_path / output} | options)

    return go


# ---- runs ----


@pytest.mark.parametrize("feature", ["output", "residual"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_learns(run, files, tmp_path, capsys, kind, feature):
    options = {"feature": feature, "license": "MIT", "seed": 3, "learning_rate": 1e-3}
    assert run(kind, **options) == 0
    assert run(kind, "start", layer_steps=1, output_steps=0, **options | {"learning_rate": 1e-9}) == 0
    assert "is ready for ComfyUI and for diffusers" in capsys.readouterr().out
    checkpoint = load_checkpoint(tmp_path / "run" / "deltaconv.safetensors")
    model = load_network(files[kind])
    assert checkpoint.architecture == find_sites(model).architecture
    assert list(checkpoint.blocks) == list(find_sites(model).channels)
    assert checkpoint.metadata["steps"] == "4" and checkpoint.metadata["license"] == "MIT"
    assert json.loads(checkpoint.metadata["training"])["seed"] == 3
    assert "stands in for" in apply(model, checkpoint).text
    first, second = weights(tmp_path / "start"), weights(tmp_path / "run")
    assert [name for name in first if torch.equal(first[name], second[name])] == []


def load_network(folder):
    import diffusers

    transformer = (folder / "transformer").is_dir()
    kind = diffusers.PixArtTransformer2DModel if transformer else diffusers.UNet2DConditionModel
    return kind.from_pretrained(folder, subfolder="transformer" if transformer else "unet")


def test_the_second_epoch_and_the_next_session_encode_nothing(run, files, tmp_path, monkeypatch):
    import diffusers
    import transformers

    calls = []
    for owner, method in ((diffusers.AutoencoderKL, "encode"), (transformers.CLIPTextModel, "forward")):
        own = getattr(owner, method)

        def counting(self, *args, own=own, **kwargs):
            calls.append(type(self).__name__)
            return own(self, *args, **kwargs)

        monkeypatch.setattr(owner, method, counting)
    options = {"cache": tmp_path / "cache", "output_steps": 0}
    assert run(layer_steps=1, output="one", **options) == 0
    once = [*calls]
    assert len(once) == 6 + 7
    assert run(layer_steps=9, output="three", **options) == 0  # four batches a pass
    assert calls == once


def test_a_stopped_run_goes_on_bit_by_bit(run, tmp_path, monkeypatch, capsys):
    from deltaconv_core.diffusers.distill import progress

    options = {"layer_steps": 3, "output_steps": 2, "caption_dropout": 0.5, "accumulation": 2}
    assert run(output="whole", **options) == 0
    go = progress.ProgressBar.__call__

    def stopping(self, row):
        self.stop.asked = row.step == 4
        go(self, row)

    monkeypatch.setattr(progress.ProgressBar, "__call__", stopping)
    assert run(output="stopped", **options) == 130
    assert "The same command resumes it" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "stopped/deltaconv.safetensors").metadata["steps"] == "4"
    monkeypatch.undo()
    assert run(output="stopped", **options) == 0
    assert same(tmp_path / "whole", tmp_path / "stopped")
    assert (tmp_path / "whole/log.csv").read_text() == (tmp_path / "stopped/log.csv").read_text()


def test_signals(monkeypatch):
    """Those that come together count once; a later one ends the process, here by Python's own handler."""
    from deltaconv_core.diffusers.distill import progress

    stop = progress.Stop()
    before = signal.getsignal(signal.SIGINT)
    with stop.listening():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
            assert stop.asked
        monkeypatch.setattr(progress, "SAME", -1.0)
        monkeypatch.setattr(signal, "SIG_DFL", signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_stopping_before_the_training(run, tmp_path, monkeypatch, capsys):
    from deltaconv_core.diffusers.distill import samples

    def stop(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(samples, "open_picture", stop)
    assert run(cache=tmp_path / "cache") == 130
    assert last_error(capsys).startswith("stopped before the training")


def test_the_file_of_options_makes_the_same_run(run, files, tmp_path):
    assert run(learning_rate=2e-3, kernel_sizes='{"down": 7, "mid": 5}', checkpointing=False) == 0
    saved = json.loads((tmp_path / "run/config.json").read_text())
    assert saved["learning_rate"] == 2e-3 and saved["checkpointing"] is False
    again = ["distill", "--config", str(tmp_path / "run/config.json"), "--output", str(tmp_path / "again")]
    assert deltaconv_core.cli.main(again) == 0
    assert same(tmp_path / "run", tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text()) == saved | {
        "output": str(tmp_path / "again")
    }


def test_a_recommendation_chooses_blocks_and_kernels(run, files, tmp_path):
    found = find_sites(load_network(files["sd"]))
    first, second, *rest = found.channels
    advice = {
        "kind": "deltaconv-recommendation", "version": 1, "architecture": found.architecture,
        "kernel_sizes": {first: 3}, "skip": rest[:2],
    }  # fmt: skip
    file = tmp_path / "recommendation.json"
    file.write_text(json.dumps(advice))
    assert run(kernel_sizes=file) == 0
    blocks = load_checkpoint(tmp_path / "run/deltaconv.safetensors").blocks
    assert list(blocks) == [first, second, *rest[2:]]
    assert blocks[first].spec.kernel_size == 3 and blocks[second].spec.kernel_size != 3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions(run, tmp_path, precision):
    assert run(precision=precision) == 0
    assert all(w.dtype == torch.float32 and w.isfinite().all() for w in weights(tmp_path / "run").values())


def test_curves(run, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(layer_steps=2, output_steps=0, tensorboard=True) == 0
    assert run(layer_steps=3, output_steps=0, tensorboard=True) == 0
    curves = EventAccumulator(str(tmp_path / "run/tensorboard"))
    curves.Reload()
    assert [event.step for event in curves.Scalars("layer-wise/feature")] == [1, 2, 3]


def test_as_a_program(files, tmp_path):
    """A process of its own, told by a YAML file and the command line."""
    config = tmp_path / "options.yaml"
    config.write_text(f"model: {files['sd']}\ndata: {files['data']}\nlearning_rate: 1e-3\nseed: 5\n")
    words = arguments(**QUICK | {"output": tmp_path / "run", "config": config})
    done = subprocess.run([*start(), *words], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "7 blocks" in done.stdout and "learn from 6 pictures" in done.stdout
    saved = json.loads((tmp_path / "run/config.json").read_text())
    assert saved["seed"] == 5 and saved["learning_rate"] == 1e-3 and saved["layer_steps"] == 2


# ---- what is refused ----


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-100])


def broken_picture(folder):
    cut_off(folder / "data/3.png")


def no_weights(folder):
    (folder / "model/unet/diffusion_pytorch_model.safetensors").unlink()


def pickled_weights(folder):
    file = folder / "model/vae/diffusion_pytorch_model.safetensors"
    torch.save({}, file.with_suffix(".bin"))
    file.unlink()


def change(file, **values):
    def spoil(folder):
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (None, {"model": "nowhere"}, "there is no nowhere"),
        (None, {"data": "nowhere"}, "there is no folder nowhere"),
        (None, {"resolution": 7}, "at least 8 pixels"),
        (None, {"blocks": "nothing"}, "'nothing' matches no site"),
        (None, {"kernel_sizes": 4}, "odd kernel_size"),
        (None, {"kernel_sizes": "gone.json"}, "cannot read the kernel sizes in gone.json"),
        (None, {"learning_rate": 0}, "learning_rate above 0"),
        (None, {"layer_steps": 0, "output_steps": 0}, "layer_steps + output_steps to be at least 1"),
        (None, {"batch_size": 0}, "batch_size to be at least 1"),
        (None, {"caption_dropout": 1.5}, "caption_dropout from 0 to 1"),
        (None, {"max_ratio": 0.5}, "max_ratio to be at least 1"),
        (None, {"config": "gone.json"}, "cannot read the options in gone.json"),
        (broken_picture, {}, "3.png is not a picture that can be read"),
        (no_weights, {}, "diffusers cannot load"),
        (pickled_weights, {}, "diffusers cannot load"),
        (lambda folder: (folder / "model/model_index.json").unlink(), {}, "there is no"),
        (change("model/scheduler/scheduler_config.json", prediction_type="sample"), {}, "'sample'"),
        (change("model/vae/config.json", latents_mean=[0, 0, 0, 0]), {}, "another kind of latents"),
    ],
)
def test_bad_input(files, tmp_path, capsys, spoil, options, message):
    """One line that says it, and nothing is written where the run would be."""
    where = {"model": files["sd"], "data": files["data"]}
    if spoil is not None:
        where = {name: shutil.copytree(path, tmp_path / name) for name, path in where.items()}
        spoil(tmp_path)
    output = tmp_path / "run"
    assert distil(**where | {"output": output, "cache": tmp_path / "cache"} | options) == 2
    line = last_error(capsys)
    assert line.startswith("error: ") and message in line
    assert not output.exists()


@pytest.mark.parametrize(
    ("package", "options"),
    [("tensorboard", {"tensorboard": True}), ("bitsandbytes", {"optimizer": "adamw8bit"})],
)
def test_a_missing_package_is_told_before_anything_is_encoded(
    run, tmp_path, capsys, monkeypatch, package, options
):
    for module in ("torch.utils.tensorboard", "bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, module, None)
    assert run(**options, cache=tmp_path / "cache") == 2
    assert f"pip install {package}" in last_error(capsys)
    assert not (tmp_path / "cache").exists()


def test_another_schedule_is_another_teacher(run, files, tmp_path, capsys):
    assert run() == 0
    copy = shutil.copytree(files["sd"], tmp_path / "model")
    change("model/scheduler/scheduler_config.json", beta_end=0.03)(tmp_path)
    assert run(model=copy) == 2 and "schedule" in last_error(capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"modle": "x"}', "has modle, which distill does not know"),
        ('{"layer_steps": 2.5}', "expected layer_steps to be a whole number, got '2.5'"),
        ('{"layer_steps": true}', "expected layer_steps to be a whole number"),
        ('{"checkpointing": "perhaps"}', "expected checkpointing to be true or false"),
        ('{"betas": [0.9]}', "expected betas to be two numbers"),
        ('{"feature": "both"}', "expected feature to be one of output, residual"),
        ("[1]", "to hold options and their values, got list"),
        ("{", "is not JSON"),
        ("{}", "expected --model and --data"),
    ],
)
def test_bad_files_of_options(tmp_path, capsys, text, message):
    file = tmp_path / "options.json"
    file.write_text(text)
    assert deltaconv_core.cli.main(["distill", "--config", str(file)]) == 2
    assert message in last_error(capsys)


@pytest.mark.parametrize("words", [["--layer-steps", "x"], ["--feature", "both"], ["--colour", "red"]])
def test_bad_command_lines(capsys, words):
    with pytest.raises(SystemExit) as ended:
        deltaconv_core.cli.main(["distill", *words])
    assert ended.value.code == 2 and words[0].strip("-").partition("-")[0] in last_error(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 1e-2}, "learning_rate 0.0003, now 0.01"),
        ({"batch_size": 1}, "batch_size '2', now '1'"),
        ({"resolution": 48}, "sizes '32 pixels squared, ratio up to 2.0', now '48"),
        ({"blocks": "mid"}, "blocks"),
        ({"kind": "pixart"}, "teacher"),
    ],
)
def test_another_run_in_the_folder(run, tmp_path, capsys, options, message):
    """Refused before anything is encoded for it."""
    if not (tmp_path / "run").exists():
        assert run() == 0
    before = (tmp_path / "run/config.json").read_text()
    assert run(**options, cache=tmp_path / "cache") == 2
    assert not (tmp_path / "cache").exists()
    line = last_error(capsys)
    assert "was started with" in line and message in line
    assert (tmp_path / "run/config.json").read_text() == before


def test_help_states_every_option(capsys):
    with pytest.raises(SystemExit):
        deltaconv_core.cli.main(["distill", "--help"])
    text = capsys.readouterr().out
    options = set(Options.__dataclass_fields__)
    assert all(f"--{name.replace('_', '-')}" in text for name in options)
    assert text.count("(default:") + text.count("(required)") >= len(options) - text.count("(default\n")


def test_the_page_states_every_option_as_the_help_does():
    text = (Path(__file__).parents[3] / "docs" / "distill.md").read_text(encoding="utf-8")
    rows = text.partition("## All options")[2].strip().splitlines()[2:]
    expected = []
    for one in sorted(OPTIONS.values(), key=lambda one: PARTS.index(About.of(one).part)):
        more = f" {MORE[one.name]}." if one.name in MORE else ""
        expected.append(f"| `{flag(one.name)}` | {default_text(one)} | {About.of(one).sentence}{more} |")
    assert rows == expected


def test_options_are_read_by_the_type_of_their_field(tmp_path):
    file = tmp_path / "options.json"
    values = {
        "model": "m", "data": "d", "resolution": 64, "betas": [0.5, 0.75], "checkpointing": False,
        "cache": "c", "learning_rate": 1, "variant": "fp16",
    }  # fmt: skip
    file.write_text(json.dumps(values))
    read = read_options({"ema": 0.5}, file)
    assert read.betas == (0.5, 0.75) and read.checkpointing is False and read.cache == Path("c")
    assert (read.resolution, read.variant, read.ema) == (64, "fp16", 0.5)
    assert type(read.resolution) is int and type(read.learning_rate) is float


def test_the_options_are_read_before_anything_optional_is_loaded():
    code = (
        "import sys, deltaconv_core.commands.distill; print(*sorted(m for m in sys.modules "
        "if m.startswith(('accelerate', 'diffusers', 'transformers', 'deltaconv_core.diffusers.distill.'))))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    rooms = (f"deltaconv_core.diffusers.distill.{name}" for name in ("options", "parse"))
    assert done.stdout.split() == list(rooms)


def test_context_width_is_what_the_models_take():
    assert CONTEXT_DIM == 4 + 12  # of the two encoders in `make_xl_pipeline`
