"""The checkpoint file: exact, atomic, and refused with one clear error when anything about it is wrong."""

from __future__ import annotations

import json
import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import deltaconv_core
from deltaconv_core import (
    BlockSpec,
    CheckpointError,
    DeltaConvBlock,
    load_checkpoint,
    save_checkpoint,
)
from testing.checkpoints import BASE, OTHER, SITE, assert_same, small_checkpoint
from testing.compare import ROUNDING, largest_error


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_checkpoint(small_checkpoint(), path)
    return path


def rewrite(path, header=None, tensors=None):
    """Applies edits to the description in the header and to the tensors of a file."""
    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["deltaconv"])
    named = load_file(path)
    (header or (lambda h: None))(description)
    (tensors or (lambda t: None))(named)
    save_file(named, path, {"deltaconv": json.dumps(description)})


def rewrite_raw(path, edit):
    """Applies an edit to the raw JSON header, leaving the data as it is."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def test_round_trip_is_exact(path):
    loaded = load_checkpoint(str(path))
    assert_same(loaded, small_checkpoint())
    assert list(loaded.blocks) == [SITE, OTHER]
    x = torch.randn(1, 15, 12)
    expected = small_checkpoint().blocks[OTHER](x, (3, 5))
    assert largest_error(loaded.blocks[OTHER](x, (3, 5)), expected) < ROUNDING
    again = path.with_name("again.safetensors")
    save_checkpoint(loaded, again)
    assert again.read_bytes() == path.read_bytes()


def test_awkward_tensors_survive(tmp_path):
    checkpoint = small_checkpoint()
    whole = torch.randn(8, 6)
    checkpoint.base_weights = {
        "rows": whole[::2],
        "turned": whole.T,
        "same": whole,
        "empty": torch.zeros(0, 3),
    }
    checkpoint.base_weights["float8"] = torch.randn(5).to(torch.float8_e4m3fn)
    checkpoint.blocks[SITE] = DeltaConvBlock(BlockSpec(8, 3, ratio=1.0))
    checkpoint.blocks[SITE].conv_out.weight = checkpoint.blocks[SITE].conv_pool.weight
    save_checkpoint(checkpoint, tmp_path / "a.safetensors")
    assert_same(load_checkpoint(tmp_path / "a.safetensors"), checkpoint)


def test_loaded_tensors_do_not_hang_on_the_file(path):
    loaded = load_checkpoint(path)
    with open(path, "r+b") as file:
        file.seek(-200, os.SEEK_END)
        file.write(b"\xff" * 200)
    assert_same(loaded, small_checkpoint())


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_others_may_read_what_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        save_checkpoint(small_checkpoint(), tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640


def refusal(path, *words):
    """Asserts that loading is refused by an error with the file's name and these words."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


def test_refuses_what_is_no_file(tmp_path):
    refusal(tmp_path / "missing.safetensors", "there is no file")
    refusal(tmp_path, "there is no file")


@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
def test_never_opens_a_pickle(tmp_path, form):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    path = tmp_path / "renamed.safetensors"
    if form == "plain":
        path.write_bytes(pickle.dumps(Bomb()))
    else:
        torch.save({"weights": Bomb()}, path, _use_new_zipfile_serialization=form == "zip")
    refusal(path, "pickle", "only safetensors files are accepted")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_header_as_long_as_a_pickle_begins_is_no_pickle(tmp_path, protocol):
    path = tmp_path / "a.safetensors"
    checkpoint = small_checkpoint()
    checkpoint.metadata = {"fill": ""}
    save_checkpoint(checkpoint, path)
    spare = (0x80 + 256 * protocol) - int.from_bytes(path.read_bytes()[:8], "little")
    checkpoint.metadata["fill"] = "x" * (spare % 65536)
    save_checkpoint(checkpoint, path)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert_same(load_checkpoint(path), checkpoint)
    assert length.to_bytes(8, "little")[:2] == bytes([0x80, protocol])


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.3, 0.6, 0.99, 0.9999])
def test_refuses_a_truncated_file(path, share):
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])
    refusal(path, "download or save it again")


@pytest.mark.parametrize(
    "junk", [b"<!DOCTYPE html><html>Not found</html>", b"\0" * 100, b"\x05\0\0\0\0\0\0\0hello, world"]
)
def test_refuses_other_files(path, junk):
    path.write_bytes(junk)
    refusal(path, "safetensors file")


def _first(header):
    return next(entry for name, entry in header.items() if name != "__metadata__")


@pytest.mark.parametrize(
    "lie",
    [
        lambda h: _first(h)["shape"].append(2),
        lambda h: _first(h).update(shape=[1 << 62, 1 << 62]),
        lambda h: _first(h).update(data_offsets=[0, 1 << 40]),
        lambda h: _first(h).update(data_offsets=[8, 4]),
        lambda h: _first(h).update(data_offsets=[-8, 0]),
        lambda h: _first(h).update(dtype="F64"),
        lambda h: _first(h).update(dtype="F12"),
        lambda h: h.update(ghost={"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}),
        lambda h: h.update(__metadata__={"deltaconv": 1}),
    ],
)
def test_refuses_a_header_that_lies(path, lie):
    rewrite_raw(path, lie)
    refusal(path, "safetensors file")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", [f"blocks.{SITE}.conv_up.weight", f"base_weights.{BASE}"])
def test_refuses_numbers_that_are_none(path, key, value):
    rewrite(path, tensors=lambda t: t[key].view(-1)[3:5].fill_(value))
    refusal(path, key, "2 NaN or infinite values")


def test_refuses_whole_numbers(path):
    key = f"blocks.{SITE}.conv_up.bias"
    rewrite(path, tensors=lambda t: t.update({key: torch.zeros(4, dtype=torch.int32)}))
    refusal(path, key, "torch.int32", "floating point")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop(f"blocks.{SITE}.conv_up.bias"), [f"lack {SITE}.conv_up.bias"]),
        (lambda t: t.update({f"blocks.{SITE}.conv_x.bias": torch.ones(1)}), [f"unknown {SITE}.conv_x.bias"]),
        (
            lambda t: t.update({"blocks.nowhere.conv_up.bias": torch.ones(1)}),
            ["unknown nowhere.conv_up.bias"],
        ),
        (lambda t: t.update({"optimizer.step": torch.ones(1)}), ["unknown tensors optimizer.step"]),
        (lambda t: t.update({f"blocks.{SITE}.conv_up.bias": torch.ones(5)}), ["shape (5,), expected (4,)"]),
        (
            lambda t: t.update({f"blocks.{SITE}.conv_up.weight": torch.ones(8, 4)}),
            ["shape (8, 4), expected (4, 8)"],
        ),
    ],
)
def test_refuses_tensors_that_do_not_follow_from_the_specs(path, edit, words):
    rewrite(path, tensors=edit)
    refusal(path, *words)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda h: h.update(format=2), ["format version 2", "reads 1", "update"]),
        (lambda h: h.pop("format"), ["format version None"]),
        (lambda h: h.pop("specs"), ["specs in its header to be an object, got None"]),
        (lambda h: h.pop("architecture"), ["name of an architecture"]),
        (lambda h: h.update(specs=[]), ["specs in its header to be an object, got []"]),
        (lambda h: h.update(specs={}), ["holds no block"]),
        (lambda h: h.update(metadata={"a": 1}), ["metadata to be text, got 'a': 1"]),
        (lambda h: h.update(architecture="sd15"), [SITE, "8 channels", "sd15 has 320 channels there"]),
        (lambda h: h.update(architecture="pixart_sigma"), [SITE, "no such site"]),
        (lambda h: h["specs"].update({SITE: "big"}), [SITE, "to be an object, got 'big'"]),
        (lambda h: h["specs"][SITE].update(gate="relu"), [SITE, "got 'relu'"]),
        (lambda h: h["specs"][SITE].update(heads=8), [SITE, "unknown ['heads']"]),
        (lambda h: h["specs"][SITE].update(dim=10**12), [SITE, "dim"]),
        (
            lambda h: h["specs"][SITE].update(kernel_size=5),
            [SITE, "conv_spatial.weight", "(4, 1, 3, 3)", "(4, 1, 5, 5)"],
        ),
        (lambda h: h["specs"][SITE].update(scales=[1]), ["unknown", "gates.1.conv_spatial.weight"]),
        (lambda h: h["specs"][SITE].update(depthwise_bias=True), ["lack", "gates.0.conv_spatial.bias"]),
    ],
)
def test_refuses_a_header_that_does_not_fit(path, edit, words):
    rewrite(path, header=edit)
    refusal(path, *words)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({}, "tensors that no known form of the block has"),
        ({"deltaconv": "{"}, "header is not JSON"),
        ({"deltaconv": "[" * 100_000}, "header is not JSON"),
        ({"deltaconv": "[]"}, "header to be an object, got list"),
    ],
)
def test_refuses_a_header_that_is_none(path, header, message):
    save_file(load_file(path), path, header)
    refusal(path, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.blocks.clear(), "holds no block"),
        (lambda c: c.metadata.update(steps=10), "metadata to be text, got 'steps': 10"),
        (lambda c: setattr(c, "architecture", ""), "name of an architecture"),
        (lambda c: setattr(c, "architecture", "sdxl"), "sdxl has no such site"),
        (lambda c: c.blocks[SITE].conv_up.weight.data.fill_(float("nan")), "32 NaN or infinite values of 32"),
    ],
)
def test_refuses_to_save_what_it_would_not_load(path, change, message):
    before = path.read_bytes()
    checkpoint = small_checkpoint(1)
    change(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(checkpoint, path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(CheckpointError, match="cannot write .*missing"):
        save_checkpoint(small_checkpoint(), tmp_path / "missing" / "a.safetensors")


KILLS = """
import itertools, os, resource, signal, sys
from pathlib import Path
import torch
from deltaconv_core import BlockSpec, Checkpoint, DeltaConvBlock, load_checkpoint, save_checkpoint
from deltaconv_core.util import whole_file
from deltaconv_core.weights import safefile

path = Path(sys.argv[1])

def filled(value):
    block = DeltaConvBlock(BlockSpec(64, 3))
    for parameter in block.parameters():
        torch.nn.init.constant_(parameter, value)
    return Checkpoint("unet-64x1", {"mid_block.attn1": block}, metadata={"value": str(value)})

def at_event(number):
    def count(frame, event, argument):
        nonlocal number
        number -= frame.f_code.co_filename in (safefile.__file__, whole_file.__file__)
        if number == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.setprofile(count)

def at_byte(number):
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))

def save_and_die(when, number):
    save_checkpoint(old, path)
    child = os.fork()
    if child == 0:
        when(number)
        save_checkpoint(new, path)
        sys.setprofile(None)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    loaded = load_checkpoint(path)
    value = float(loaded.metadata["value"])
    assert all((p == value).all() for p in loaded.blocks["mid_block.attn1"].parameters())
    leftovers = [file for file in path.parent.iterdir() if file != path]
    for file in leftovers:
        file.unlink()
    return os.WIFSIGNALED(status), value, bool(leftovers)

old, new = filled(1.0), filled(2.0)
save_checkpoint(old, path)
size = path.stat().st_size
for number in (1, size // 2, size - 1):
    assert save_and_die(at_byte, number) == (True, 1.0, True), number
ends = []
for number in itertools.count(1):
    killed, *end = save_and_die(at_event, number)
    ends.append(end)
    if not killed:
        break
steps = [end for end, _ in itertools.groupby(ends)]
assert steps == [[1.0, False], [1.0, True], [2.0, False]], steps
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path):
    """At every call that the writing makes, and at bytes in the middle of the file."""
    (tmp_path / "models").mkdir()
    root = Path(deltaconv_core.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", KILLS, tmp_path / "models" / "weights.safetensors"],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
