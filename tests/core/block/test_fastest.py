"""The choice of the fastest: what is measured, what is remembered, and where nothing is."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from deltaconv_core import BlockSpec, DeltaConvBlock
from deltaconv_core.block.ops import fastest


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that knows nothing yet, with a file and a clock of its own; returns the file's path."""
    path = tmp_path / "cache" / "fastest.json"
    monkeypatch.setenv("DELTACONV_TUNE", "1")
    monkeypatch.setenv("DELTACONV_TUNE_CACHE", str(path))
    monkeypatch.setattr(fastest, "time", SimpleNamespace(perf_counter=lambda: Trials.now))
    fastest.known.reset()
    yield path
    fastest.known.reset()


class Trials:
    """Candidates that take a known time on the clock of `fresh`, and counts how often each ran."""

    now = 0.0

    def __init__(self, **seconds):
        self.seconds = seconds
        self.runs = dict.fromkeys(seconds, 0)

    def run(self, name):
        self.runs[name] += 1
        if self.seconds[name] is None:
            raise RuntimeError("not on this device")
        Trials.now += self.seconds[name]

    def choose(self, default="slow", details=("K", 7), tokens=64, like=None):
        candidates = {name: name for name in self.seconds}
        like = torch.zeros(1) if like is None else like
        with torch.no_grad():
            return fastest.fastest("test", candidates, default, like, details, tokens, self.run)

    @property
    def total(self):
        return sum(self.runs.values())


def test_takes_the_fastest_and_remembers_it(fresh, monkeypatch):
    trials = Trials(slow=0.004, fast=0.001, broken=None)
    assert trials.choose() == "fast"
    assert trials.runs["broken"] == 1
    before = trials.total
    assert trials.choose() == "fast" and trials.total == before
    fastest.known.reset()  # a new process with the same file
    assert trials.choose() == "fast" and trials.total == before
    (kind,) = json.loads(fresh.read_text())["choices"]
    assert (
        "K 7" in kind and "float32" in kind and f"torch {torch.__version__}" in kind and "64 tokens" in kind
    )
    assert list(fresh.parent.iterdir()) == [fresh]


def test_is_bounded(fresh, monkeypatch):
    quick = Trials(slow=0.0, fast=0.0)
    quick.choose()
    assert quick.total == 2 * fastest.ROUNDS
    late = Trials(
        slow=fastest.TIME_BUDGET,
        fast=fastest.TIME_BUDGET,
        hopeless=fastest.TIME_BUDGET * fastest.HOPELESS * 1.2,
    )
    late.choose(details=("another",))
    assert late.runs == {"slow": fastest.LEAST_ROUNDS, "fast": fastest.LEAST_ROUNDS, "hopeless": 2}


def test_waits_for_the_device_that_is_measured(fresh, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    second = torch.device("cuda", 1)
    fastest.shortest_runs({"a": 1}, second, lambda candidate: None)
    assert waited and set(waited) == {second}


@pytest.mark.parametrize(
    ("times", "choice"),
    [
        ({"slow": 1.0, "fast": 0.96}, "slow"),
        ({"slow": 1.0, "fast": 0.94}, "fast"),
        ({"fast": 1.0}, "fast"),
        ({}, "slow"),
    ],
    ids=["hardly faster", "faster", "the default cannot run", "none can run"],
)
def test_the_default_stays_unless_another_is_clearly_faster(fresh, monkeypatch, times, choice):
    monkeypatch.setattr(fastest, "shortest_runs", lambda candidates, device, trial: times)
    assert Trials(slow=0.0, fast=0.0).choose() == choice


def test_what_cannot_run_is_out(fresh):
    assert Trials(slow=None, fast=0.0).choose() == "fast"
    assert Trials(slow=None, fast=None).choose(details=("K", 9)) == "slow"


@pytest.mark.parametrize(
    ("change", "measured"),
    [
        ({}, False),
        ({"tokens": 70}, False),
        ({"tokens": 128}, True),
        ({"details": ("K", 9)}, True),
        ({"like": torch.zeros(1, dtype=torch.float64)}, True),
    ],
    ids=str,
)
def test_what_makes_a_kind(fresh, change, measured):
    trials = Trials(slow=0.0, fast=0.0)
    trials.choose()
    before = trials.total
    trials.choose(**change)
    assert (trials.total > before) == measured


def test_threads_and_version_make_a_kind(fresh, monkeypatch):
    trials = Trials(slow=0.0, fast=0.0)
    for name, value in (("get_num_threads", lambda: 64), ("__version__", "99.0")):
        trials.choose()
        before = trials.total
        monkeypatch.setattr(torch, name, value)
        fastest.known.reset()
        trials.choose()
        assert trials.total > before


def test_all_large_sizes_are_one_kind(fresh):
    trials = Trials(slow=0.0, fast=0.0)
    trials.choose(tokens=128 * 128)
    before = trials.total
    trials.choose(tokens=1920 * 1080)
    assert trials.total == before
    assert fastest.trial_rows(torch.device("cpu"), (1080, 1920)) == 1
    assert fastest.trial_rows(torch.device("cpu"), (16, 16)) == 16


def off_by_environment(monkeypatch):
    monkeypatch.setenv("DELTACONV_TUNE", "0")


def off_by_determinism(monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)


def off_by_compiling(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


@pytest.mark.parametrize("off", [off_by_environment, off_by_determinism, off_by_compiling])
def test_nothing_is_measured(fresh, monkeypatch, off):
    off(monkeypatch)
    trials = Trials(slow=0.0, fast=0.0)
    assert trials.choose() == "slow" and trials.total == 0 and not fresh.exists()


def test_nothing_is_measured_without_values_or_under_a_counter(fresh):
    from torch.utils.flop_counter import FlopCounterMode

    trials = Trials(slow=0.0, fast=0.0)
    assert trials.choose(like=torch.zeros(1, device="meta")) == "slow"
    with FlopCounterMode(display=False):
        assert trials.choose() == "slow"
    assert trials.total == 0


def test_nothing_is_measured_while_a_graph_is_captured(fresh, monkeypatch):
    class OnGpu:
        device, dtype, is_cuda = torch.device("cuda"), torch.float16, True

    monkeypatch.setattr(fastest, "device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    trials = Trials(slow=0.0, fast=0.0)
    assert trials.choose(like=OnGpu()) == "slow" and trials.total == 0


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"version": 1}', '{"version": 1, "choices": 5}', "\udcff"],
    ids=["empty", "cut off", "list", "no choices", "number", "not text"],
)
def test_a_corrupt_file_is_said_and_replaced(fresh, content, caplog):
    fresh.parent.mkdir()
    fresh.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert Trials(slow=0.004, fast=0.0).choose() == "fast"
    assert str(fresh) in caplog.text and "measured again" in caplog.text
    assert list(json.loads(fresh.read_text())["choices"].values()) == ["fast"]


def test_choices_of_another_version_of_the_file_and_unknown_ones_do_not_count(fresh, monkeypatch, caplog):
    trials = Trials(slow=0.004, fast=0.0)
    trials.choose()
    text = fresh.read_text()
    for old, new in (('"version": 1', '"version": 2'), ('"fast"', '"gone"')):
        fresh.write_text(text.replace(old, new))
        fastest.known.reset()
        before = trials.total
        assert trials.choose() == "fast" and trials.total > before
    assert not caplog.records


def test_a_file_that_cannot_be_written_is_said(fresh, caplog):
    fresh.parent.write_text("in the way")
    assert Trials(slow=0.004, fast=0.0).choose() == "fast"
    assert f"cannot write {fresh}" in caplog.text


def test_other_processes_choices_stay(fresh):
    Trials(slow=0.0, fast=0.0).choose()
    content = json.loads(fresh.read_text())
    content["choices"]["of another process"] = "x"
    fresh.write_text(json.dumps(content))
    Trials(slow=0.0, fast=0.0).choose(details=("K", 9))
    assert len(json.loads(fresh.read_text())["choices"]) == 3


def test_without_a_file(fresh, monkeypatch):
    monkeypatch.setenv("DELTACONV_TUNE_CACHE", "")
    assert fastest.cache_file() is None
    assert Trials(slow=0.004, fast=0.0).choose() == "fast" and not fresh.exists()


@pytest.mark.parametrize(
    ("platform", "variable", "rest"),
    [
        ("linux", "XDG_CACHE_HOME", ()),
        ("win32", "LOCALAPPDATA", ()),
        ("darwin", "HOME", ("Library", "Caches")),
    ],
)
def test_place_of_the_file(monkeypatch, tmp_path, platform, variable, rest):
    monkeypatch.delenv("DELTACONV_TUNE_CACHE", raising=False)
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setenv(variable, str(tmp_path))
    assert fastest.cache_file() == tmp_path.joinpath(*rest, "deltaconv", "fastest.json")


def test_a_block_measures_without_autograd_only(fresh):
    torch.manual_seed(0)
    block, x = DeltaConvBlock(BlockSpec(16, 11)), torch.randn(2, 64, 16)
    with_grad = block(x, (8, 8))
    assert not fresh.exists()
    with torch.no_grad():
        torch.testing.assert_close(block(x, (8, 8)), with_grad)
        known = fresh.read_text()
        assert all(word in known for word in ("convolution", "K 11", "channels 8", "projection"))
        first = block(x, (8, 8))
        assert torch.equal(block(x, (8, 8)), first) and fresh.read_text() == known


@pytest.mark.parametrize(("faster", "dtype"), [("as it is", torch.bfloat16), ("in float32", torch.float32)])
def test_bfloat16_on_a_cpu_runs_in_what_is_faster(fresh, faster, dtype):
    seen = set()

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.nn.functional.conv2d:
                seen.add(args[0].dtype)
            return function(*args, **(kwargs or {}))

    block = DeltaConvBlock(BlockSpec(16, 3)).bfloat16()
    x = torch.randn(2, 64, 16).bfloat16()
    with torch.no_grad(), fastest.fixed(product=faster, convolution="channels_last"), Watch():
        assert block(x, (8, 8)).dtype == torch.bfloat16
    assert seen == {dtype}


def test_choices_of_processes_at_one_moment_are_all_kept(fresh):
    code = (
        "import sys; from deltaconv_core.block.ops import fastest\n"
        "for n in range(40): fastest._keep(f'{sys.argv[1]} {n}', 'a')"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, name]) for name in ("one", "two")]
    assert [process.wait() for process in both] == [0, 0]
    kept = json.loads(fresh.read_text())["choices"]
    assert set(kept) == {f"{name} {n}" for name in ("one", "two") for n in range(40)}


@pytest.mark.parametrize("stated", [None, "~nobody-has-this-name/fastest.json"])
def test_users_without_a_home_folder_keep_nothing(monkeypatch, stated):
    def home(*args):
        raise RuntimeError("Could not determine home directory.")

    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "DELTACONV_TUNE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    if stated is not None:
        monkeypatch.setenv("DELTACONV_TUNE_CACHE", stated)
    monkeypatch.setattr("pathlib.Path.home", home)
    assert fastest.cache_file() is None
    fastest._keep("kind", "name")
