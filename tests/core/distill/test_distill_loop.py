"""Runs: what a step does, what is kept, and that resuming is the same as never having stopped."""

import copy
import math
import os
import signal
import subprocess
import sys

import pytest
import torch

from deltaconv_core import BlockSpec, DeltaConvBlock
from deltaconv_core.distill import Batch, RunFolder, Settings, distill, loop, random_start, run_folder
from deltaconv_core.errors import CheckpointError, DeltaConvError
from testing.compare import same_weights
from testing.tiny_network import SETTINGS, batches, make_mixers, make_network, trained


def weights(mixers):
    return {f"{site}.{name}": p for site, mixer in mixers.items() for name, p in mixer.state_dict().items()}


def same(a, b):
    return same_weights(weights(a), weights(b))


class Cancel(Exception):
    pass


def stop_at(step):
    def on_step(row):
        if row.step == step:
            raise Cancel

    return on_step


@pytest.mark.parametrize(("phase", "loss"), [("layer_steps", "feature"), ("output_steps", "teacher")])
def test_training_makes_the_student_better_and_leaves_the_network_alone(phase, loss):
    network = make_network()
    mixers, before = make_mixers(network), copy.deepcopy(network.state_dict())
    for mixer in mixers.values():
        random_start(mixer)

    def data(number):
        batch = batches(number % 3)
        return Batch(batch.noisy, make_network()(batch), batch.snr)

    settings = Settings(**{"layer_steps": 0, "output_steps": 0, phase: 60}, learning_rate=1e-2, warmup=5)
    result = distill(network, mixers, data, settings)
    values = [row.losses[loss] for row in result.rows]
    assert sum(values[-6:]) < 0.5 * sum(values[:6])
    assert result.step == 60 and not result.stopped
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_one_step_by_hand():
    """AdamW's first step on the mean gradient of two batches, clipped; the average takes 90 % of it."""
    settings = Settings(
        layer_steps=1, output_steps=0, accumulation=2, learning_rate=0.1, warmup=0, decay=0, clip=0.01,
        weight_decay=0.5, ema=0.99,
    )  # fmt: skip
    mixers, result = trained(settings)
    network = make_network()
    start = make_mixers(network)
    for number in (0, 1):
        x = network.enter(batches(number).noisy)
        for i, layer in enumerate(network.layers):
            normed = layer.norm1(x)
            y = layer.attn1(normed)
            (start[f"layers.{i}.attn1"](normed, grid=(5, 7)) - y).square().mean().div(2).backward()
            x = x + y
            x = x + torch.tanh(layer.ff(layer.norm2(x)))
    gradients = [p.grad for mixer in start.values() for p in mixer.parameters()]
    norm = torch.stack([g.norm() for g in gradients]).norm()
    assert result.rows[0].gradient_norm == pytest.approx(norm.item(), rel=1e-5)
    ours = [p for mixer in mixers.values() for p in mixer.parameters()]
    for after, before in zip(ours, [p for m in start.values() for p in m.parameters()], strict=True):
        g = before.grad * 0.01 / (norm + 1e-6)
        stepped = before * (1 - 0.1 * 0.5) - 0.1 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(after, before.lerp(stepped, 0.9), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("step", [1, 3, 4, 5, 7])
def test_resumed_equals_uninterrupted(step, tmp_path):
    expected, result = trained()
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(Cancel):
        trained(folder=folder, on_step=stop_at(step))
    rows = []
    mixers, resumed = trained(folder=RunFolder(tmp_path / "run"), on_step=rows.append)
    assert same(mixers, expected)
    assert resumed.rows == result.rows
    assert [row.step for row in rows] == list(range(step + 1, 9))
    again, _ = trained(folder=folder, on_step=stop_at(-1))  # a finished run gives its weights once more
    assert same(again, expected)


def test_a_run_may_go_on_for_longer(tmp_path):
    folder = RunFolder(tmp_path)
    trained(folder=folder)
    longer = Settings.from_dict(SETTINGS.to_dict() | {"output_steps": 6, "save_every": 50})
    mixers, result = trained(longer, folder)
    assert result.step == 10 and not same(mixers, trained()[0])


def test_an_error_in_the_middle_of_a_step_keeps_the_last_whole_one(tmp_path):
    def broken(number):
        if number == 9:  # the second batch of step 5
            raise RuntimeError("the disk is gone")
        return batches(number)

    with pytest.raises(RuntimeError, match="the disk is gone"):
        trained(folder=RunFolder(tmp_path), data=broken)
    state, rows = RunFolder(tmp_path).load()
    assert state.step == 4 and len(rows) == 4
    assert same(trained(folder=RunFolder(tmp_path))[0], trained()[0])


KILLED = """
import time
from deltaconv_core.distill import RunFolder
from testing.tiny_network import trained
def on_step(row):
    print(row.step, flush=True)
    if row.step >= 5:
        time.sleep(60)
trained(folder=RunFolder({folder!r}), on_step=on_step)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_kill_loses_at_most_the_steps_since_the_last_save(tmp_path):
    program = KILLED.format(folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        while process.stdout.readline().strip() != "5":
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    state, rows = RunFolder(tmp_path).load()
    assert state.step == 3 and [row.step for row in rows] == [1, 2, 3]
    assert same(trained(folder=RunFolder(tmp_path))[0], trained()[0])


def test_a_kill_while_the_state_is_written_leaves_the_old_one(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    trained(Settings.from_dict(SETTINGS.to_dict() | {"layer_steps": 3, "output_steps": 0}), folder)

    def die(*_):
        raise OSError("No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        trained(folder=folder, on_step=lambda row: monkeypatch.setattr("os.replace", die))
    monkeypatch.undo()
    state, rows = folder.load()
    assert state.step == 3 and len(rows) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "state.safetensors"]


def test_a_failed_save_doubles_no_row_of_the_log(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    write = run_folder.write_file

    def failing_once(*args, **more):
        monkeypatch.setattr(run_folder, "write_file", write)
        raise CheckpointError("No space left on device")

    monkeypatch.setattr(run_folder, "write_file", failing_once)
    with pytest.raises(CheckpointError):
        trained(folder=folder)
    assert folder.load()[0].step == 3
    _, result = trained(folder=folder)
    assert [row.step for row in result.rows] == [row.step for row in folder.read_log()] == [*range(1, 9)]


def test_a_lost_log_starts_again(tmp_path):
    folder = RunFolder(tmp_path)
    with pytest.raises(Cancel):
        trained(folder=folder, on_step=stop_at(5))
    folder.log_file.unlink()
    _, result = trained(folder=folder)
    assert [row.step for row in result.rows] == [row.step for row in folder.read_log()] == [6, 7, 8]


class Nested(torch.optim.AdamW):
    """Gives its tensors out in a dictionary of their own, as bitsandbytes does, and takes them back flat."""

    def state_dict(self):
        state = super().state_dict()
        return state | {"state": {number: {"nested": one} for number, one in state["state"].items()}}


def test_an_optimizer_that_gives_its_state_out_in_another_form(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_optimizer", lambda weights, settings: Nested(list(weights), lr=1e-2))
    expected, _ = trained()
    with pytest.raises(Cancel):
        trained(folder=RunFolder(tmp_path), on_step=stop_at(5))
    assert same(trained(folder=RunFolder(tmp_path))[0], expected)


def test_backward_is_outside_autocast(monkeypatch):
    seen = set()
    backward = torch.Tensor.backward

    def watched(self, *args, **more):
        seen.add(torch.is_autocast_enabled("cpu"))
        return backward(self, *args, **more)

    monkeypatch.setattr(torch.Tensor, "backward", watched)
    trained(other(precision="bf16"))
    assert seen == {False}


def test_nan_stops_with_the_last_good_weights(tmp_path, caplog):
    def poisoned(number):
        batch = batches(number)
        return Batch(batch.noisy * (math.nan if number == 10 else 1), batch.target, batch.snr)

    mixers, result = trained(folder=RunFolder(tmp_path), data=poisoned)
    assert "step 6 (end to end)" in result.stopped and "nan" in result.stopped
    assert result.step == len(result.rows) == 3 and "the weights of step 3 are kept" in result.stopped
    assert "learning_rate" in caplog.text
    assert all(torch.isfinite(w).all() for w in weights(mixers).values())
    assert same(trained(folder=RunFolder(tmp_path))[0], trained()[0])  # it resumes from step 3
    assert trained(data=poisoned)[1].step == 5  # nothing was saved that it could go back to


@pytest.mark.parametrize(("save_every", "kept"), [(3, 3), (1, 4)])
def test_weights_that_exploded_are_not_the_last_good_ones(tmp_path, save_every, kept):
    """Those of step 5 give no number in step 6, so they are not kept, though due to be saved."""
    network, folder = make_network(), RunFolder(tmp_path)
    mixers = make_mixers(network)

    def explode(row):
        if row.step == 5:
            for weight in weights(mixers).values():
                weight.fill_(1e30)

    result = distill(network, mixers, batches, other(save_every=save_every), folder, explode)
    assert "step 6" in result.stopped and result.step == kept == folder.load()[0].step
    assert same(trained(folder=folder)[0], trained()[0])


def test_a_state_is_saved_once_the_next_step_was_sound(tmp_path):
    folder, saved = RunFolder(tmp_path), {}

    def look(row):
        saved[row.step] = folder.load()[0].step if folder.exists else None

    trained(other(save_every=2), folder, look)
    assert saved == {1: None, 2: None, 3: 2, 4: 2, 5: 4, 6: 4, 7: 6, 8: 6}
    assert folder.load()[0].step == 8


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_trains_and_resumes(precision, tmp_path):
    settings = Settings.from_dict(SETTINGS.to_dict() | {"precision": precision})
    expected, result = trained(settings)
    exact, _ = trained()
    assert all(math.isfinite(row.loss) for row in result.rows)
    for name, value in weights(expected).items():
        assert value.dtype == torch.float32
        assert (value - weights(exact)[name]).abs().max() < 0.05
    with pytest.raises(Cancel):
        trained(settings, RunFolder(tmp_path), stop_at(5))
    assert same(trained(settings, RunFolder(tmp_path))[0], expected)


def test_float16_skips_steps_whose_gradients_overflow():
    def large(number):
        batch = batches(number)
        return Batch(batch.noisy, batch.target * (1e30 if number == 8 else 1), batch.snr)

    settings = Settings.from_dict(
        SETTINGS.to_dict() | {"precision": "fp16", "accumulation": 1, "output_steps": 8}
    )
    _, result = trained(settings, data=large)
    assert result.step == 12 and not result.stopped
    assert [row.step for row in result.rows if not math.isfinite(row.gradient_norm)] == [9]


def other(**changes):
    return Settings.from_dict(SETTINGS.to_dict() | changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"learning_rate": 0.5}, "learning_rate 0.01, now 0.5"), ({"seed": 3}, "seed 0, now 3")],
)
def test_a_run_does_not_go_on_with_other_settings(changes, named, tmp_path):
    trained(folder=RunFolder(tmp_path))
    before = (tmp_path / "state.safetensors").read_bytes()
    with pytest.raises(DeltaConvError, match=named):
        trained(other(**changes), RunFolder(tmp_path))
    assert (tmp_path / "state.safetensors").read_bytes() == before


def test_a_run_does_not_go_on_with_other_notes_or_blocks(tmp_path):
    network = make_network()
    folder = RunFolder(tmp_path)
    distill(network, make_mixers(network), batches, SETTINGS, folder, notes={"data": "cats"})
    with pytest.raises(DeltaConvError, match="data 'cats', now 'dogs'"):
        distill(network, make_mixers(network), batches, SETTINGS, folder, notes={"data": "dogs"})
    wide = {site: DeltaConvBlock(BlockSpec(8, 5)) for site in network.attentions}
    with pytest.raises(
        DeltaConvError, match=r"gates.0.conv_spatial.weight: \(4, 1, 3, 3\), now \(4, 1, 5, 5\)"
    ):
        distill(network, wide, batches, SETTINGS, folder, notes={"data": "cats"})


def test_a_damaged_state_is_named(tmp_path):
    trained(folder=RunFolder(tmp_path))
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="state.safetensors"):
        trained(folder=RunFolder(tmp_path))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layer_steps": 0, "output_steps": 0}, "got 0"),
        ({"layer_steps": -1}, "layer_steps"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"accumulation": 0}, "accumulation"),
        ({"ema": 1.0}, "ema"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"decay": 1.5}, "decay"),
        ({"clip": -1.0}, "clip"),
        ({"precision": "fp8"}, "'fp8'"),
        ({"optimizer": "sgd"}, "adamw8bit"),
        ({"feature": "stream"}, "residual"),
        ({"save_every": 0}, "save_every"),
    ],
)
def test_settings_refuse_nonsense(changes, named):
    with pytest.raises(DeltaConvError, match=named):
        Settings(**changes)


def test_the_learning_rate_rises_stays_and_falls_in_each_phase():
    settings = Settings(layer_steps=10, output_steps=20, learning_rate=1.0, warmup=4, decay=0.5)
    rates = [settings.rate(step) for step in range(30)]
    assert rates[:6] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert rates[7] == pytest.approx(0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * 0.4)))
    assert rates[10:20] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1])
    assert rates[29] == pytest.approx(0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * 0.9)))
    assert Settings(decay=0.0).rate(499) == 3e-4


def test_the_8_bit_optimizer_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(DeltaConvError, match="pip install bitsandbytes"):
        trained(other(optimizer="adamw8bit"))
