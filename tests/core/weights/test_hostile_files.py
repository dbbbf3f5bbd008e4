"""Weights files made to do harm, or harmed while they are read: our own error, little memory, no signal."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import deltaconv_core
from deltaconv_core import (
    BlockSpec,
    Checkpoint,
    CheckpointError,
    DeltaConvBlock,
    load_checkpoint,
    save_checkpoint,
)
from deltaconv_core.weights.layout import DTYPES_BY_CODE, LARGEST_HEADER
from deltaconv_core.weights.safefile import read_file, read_header

SITE = "mid_block.attentions.0.transformer_blocks.0.attn1"
AUTHORS = "mid_block.attentions.0.transformer_blocks.0.conv1."


def write(path, header, data=b""):
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.fixture
def file(tmp_path):
    return tmp_path / "x.safetensors"


# ---- what the safetensors library reads, is read the same ----


@pytest.mark.parametrize("dtype", DTYPES_BY_CODE.values(), ids=DTYPES_BY_CODE)
def test_tensors_as_the_library_reads_them(file, dtype):
    generator = torch.Generator().manual_seed(0)
    made = {
        name: torch.randint(0, 2, shape, generator=generator).to(dtype)
        for name, shape in {
            "b": (3, 5),
            "a": (7,),
            "none": (0, 4),
            "scalar": (),
            "deep": (1, 2, 1, 2, 1),
        }.items()
    }
    save_file(made, file, {"text": "ä", "more": ""})
    texts, tensors = read_file(file, numbers=True)
    assert texts == read_header(file) == {"text": "ä", "more": ""}
    expected = load_file(file)
    assert list(tensors) == sorted(expected)
    for name, tensor in tensors.items():
        assert tensor.dtype == dtype and tensor.shape == expected[name].shape and tensor.is_contiguous()
        assert torch.equal(tensor.float(), expected[name].float())
        tensor.untyped_storage().resize_(0)  # memory of torch's own, as other programs expect it


def test_a_file_without_tensors_or_texts(file):
    save_file({}, file)
    assert read_file(file) == ({}, {})


# ---- headers ----

F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": F32 | {"dtype": "F31"}}, 4),
        ({"a": F32 | {"dtype": ["F32"]}}, 4),
        ({"a": F32 | {"shape": [2]}}, 4),
        ({"a": F32 | {"shape": [-1]}}, 4),
        ({"a": F32 | {"shape": [True]}}, 4),
        ({"a": F32 | {"shape": [1.0]}}, 4),
        ({"a": F32 | {"shape": 1}}, 4),
        ({"a": F32 | {"shape": {"0": 1}}}, 4),
        ({"a": F32 | {"shape": [10**3000] * 200}}, 4),
        ({"a": F32 | {"shape": [0, 2**60], "data_offsets": [0, 0]}}, 0),
        ({"a": F32 | {"shape": [1] * 1000}}, 4),
        ({"a": F32 | {"data_offsets": [0, 4, 8]}}, 4),
        ({"a": F32 | {"data_offsets": [4, 0]}}, 4),
        ({"a": F32 | {"data_offsets": [-4, 0]}}, 4),
        ({"a": F32 | {"data_offsets": ["0", "4"]}}, 4),
        ({"a": F32 | {"data_offsets": [10**300, 10**300 + 4]}}, 4),
        ({"a": F32}, 3),
        ({"a": F32}, 5),
        ({"a": F32, "b": F32}, 4),
        ({"a": F32, "b": F32 | {"data_offsets": [8, 12]}}, 12),
        ({"a": None}, 0),
        ({"a": 5}, 0),
        ({"__metadata__": {"a": 5}, "a": F32}, 4),
        ({"__metadata__": ["a"], "a": F32}, 4),
        ({"__metadata__": {"a": {"b": "c"}}, "a": F32}, 4),
        (b'{"__metadata__": {"a": "\\ud800"}}', 0),
        (b'{"\\udfff": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}', 0),
        (b'{"__metadata__": ' + b"[" * 100_000, 0),
        (b'{"a": ' * 50_000, 0),
        (b"{" + b"\xff" * 10, 0),
        (b"{", 0),
        (b'{"a": 1e400}', 0),
        (b'{"a": ' + b"9" * 5000 + b"}", 0),
    ],
)
def test_headers_that_lie(file, header, data):
    write(file, header, b"\0" * data)
    for read in (read_file, read_header, load_checkpoint):
        with pytest.raises(CheckpointError, match="is not a whole safetensors file") as caught:
            read(file)
        assert len(str(caught.value)) < 1000


def test_huge_headers_are_not_even_read(file):
    write(file, b'{"__metadata__": {"a": "' + b"x" * LARGEST_HEADER + b'"}}')
    with pytest.raises(CheckpointError, match=f"at most {LARGEST_HEADER} are read"):
        read_header(file)


# ---- blocks that cannot be ----


@pytest.mark.parametrize(
    "layer", ["conv_up", "conv_out", "conv_pool", "gates.0.conv_spatial", "conv_spatial"]
)
@pytest.mark.parametrize("shape", [(), (0,), (0, 0), (3,), (0, 0, 0), (2, 0, 1, 1), (1, 1, 1, 1, 1)])
@pytest.mark.parametrize("others", [False, True])
def test_weights_without_dimensions(file, layer, shape, others):
    """As the only tensor of the file, and among others that are whole."""
    whole = {
        "conv_up.weight": torch.ones(4, 8), "conv_out.weight": torch.ones(8, 2),
        "conv_pool.weight": torch.ones(8, 8), "gates.0.conv_spatial.weight": torch.ones(4, 1, 3, 3),
    }  # fmt: skip
    tensors = (whole if others else {}) | {f"{layer}.weight": torch.ones(shape)}
    save_file({AUTHORS + name: tensor for name, tensor in tensors.items()}, file)
    with pytest.raises(CheckpointError):
        load_checkpoint(file)


def spoilt(file, **values):
    """A checkpoint whose description says something else."""
    block = DeltaConvBlock(BlockSpec(16, 3))
    save_checkpoint(Checkpoint("unet-16x1", {SITE: block}, {}, {}), file)
    texts, _ = read_file(file)
    described = json.loads(texts["deltaconv"])
    spec = described["specs"][SITE] | values.pop("spec", {})
    described |= {"specs": {SITE: spec}} | values
    save_file(load_file(file), file, {"deltaconv": json.dumps(described)})
    return file


@pytest.mark.parametrize(
    "values",
    [
        {"spec": {"ratio": 10**400}},
        {"spec": {"scales": [10**400]}},
        {"spec": {"dim": 10**400}},
        {"spec": {"kernel_size": 2**63 + 1}},
        {"spec": {"gate": ["simple"]}},
        {"spec": {"gate": {"a": 1}}},
        {"spec": {"dim": 2**16, "ratio": 8}},
        {"specs": {"": {"dim": 16, "kernel_size": 3}}},
        {"specs": {"x" * 100_000: {"dim": 16, "kernel_size": "y" * 100_000}}},
        {"specs": [[]]},
        {"architecture": {"a": "b"}},
        {"architecture": "\0" * 10_000},
        {"metadata": {"a": ["z" * 100_000]}},
        {"metadata": None},
        {"format": "x" * 100_000},
        {"format": [1]},
        {"mixer": {}},
        {"mixer": "hybrid", "format": 2, "kept": {}},
        {"mixer": "w" * 100_000, "format": 2},
    ],
)
def test_descriptions_that_cannot_be(file, values):
    if values == {"architecture": "\0" * 10_000}:
        assert load_checkpoint(spoilt(file, **values)).architecture == "\0" * 10_000  # any name may be one
        return
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(spoilt(file, **values))
    assert len(str(caught.value)) <= 2000


# ---- memory and time ----

COST = """
import json, resource, sys, time
import torch
from deltaconv_core import CheckpointError, load_checkpoint
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try: load_checkpoint(sys.argv[1])
except CheckpointError: pass
before, start = peak(), time.process_time()
try: load_checkpoint(sys.argv[2]); told = ""
except CheckpointError as error: told = str(error)
print(json.dumps([peak() - before, time.process_time() - start, told]))
"""


def cost(path):
    """(peak of additional memory in MB, CPU seconds, error) of loading a file in a process of its own."""
    small = write(path.with_name("small.safetensors"), {"a": F32}, b"\0" * 4)
    root = str(Path(deltaconv_core.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", COST, str(small), str(path)],
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    kilobytes, seconds, told = json.loads(done.stdout)
    return kilobytes / 1024, seconds, told


def many_tensors(count):
    return {f"k{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(count)}


def many_blocks(count, sites="s{}"):
    spec = {"dim": 64, "kernel_size": 3, "scales": [1.0] * 8}
    specs = {sites.format(i): spec for i in range(count)}
    described = {"format": 1, "architecture": "x", "metadata": {}, "specs": specs}
    return {"__metadata__": {"deltaconv": json.dumps(described)}}


@pytest.mark.parametrize(
    "header",
    [
        many_tensors(55_000),
        many_blocks(40_000),
        {"__metadata__": {"deltaconv": json.dumps({"format": "x" * 3_900_000})}},
        {"__metadata__": {"deltaconv": json.dumps({"format": 1, "metadata": [["x"]] * 600_000})}},
        {"__metadata__": {"scales": json.dumps([1] * 1_000_000)}} | many_tensors(1),
        {f"{'unet.' * 200_000}a": F32 | {"shape": [0], "data_offsets": [0, 0]}},
        {f"{'a.' * 400_000}x": F32 | {"shape": [0], "data_offsets": [0, 0]}},
    ],
    ids=["tensors", "blocks", "one text", "values", "scales", "prefixes", "dots"],
)
def test_memory_and_time_are_bounded_by_the_file(tmp_path, header):
    path = write(tmp_path / "x.safetensors", header)
    size = path.stat().st_size / 2**20
    megabytes, seconds, told = cost(path)
    assert told and len(told) <= 2000
    assert megabytes <= 4 * size + 100
    assert seconds < 10


def test_time_grows_with_the_file_and_no_faster(tmp_path):
    def seconds(count):
        _, seconds, told = cost(write(tmp_path / "x.safetensors", many_blocks(count)))
        assert re.search("and .* more", told)
        return seconds

    assert seconds(8000) < 16 * max(seconds(1000), 0.05)


def test_large_files_are_read_into_their_own_memory_alone(tmp_path):
    """100 MB of weights take 100 MB, and what the check for infinite values needs."""
    path = tmp_path / "x.safetensors"
    save_file({f"t{i}": torch.zeros(1 << 20) for i in range(25)}, path)
    assert cost(path)[0] < 150


# ---- files that change ----


READS_ONE = """
import sys
from deltaconv_core import CheckpointError
from deltaconv_core.weights.safefile import read_file
print("ready", flush=True)
try:
    read_file(sys.argv[1])
except CheckpointError:
    sys.exit(1)
"""


def test_a_file_that_is_cut_kills_nobody(tmp_path):
    """In a process of its own, at moments that nobody chose: it ends by itself, not by SIGBUS."""
    path = tmp_path / "x.safetensors"
    root = Path(deltaconv_core.__file__).parents[1]
    for delay in (0.0, 0.01, 0.03, 0.1):
        save_file({f"t{i:03}": torch.zeros(1 << 18) for i in range(50)}, path)
        command = [sys.executable, "-c", READS_ONE, str(path)]
        with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE) as reader:
            assert reader.stdout is not None and reader.stdout.readline().strip() == b"ready"
            time.sleep(delay)
            os.truncate(path, 1 << 20)
            assert reader.wait(60) in (0, 1)


# ---- names ----


def test_links_that_lead_nowhere_are_named(tmp_path):
    (tmp_path / "mine.safetensors").symlink_to("/mnt/unplugged/mine.safetensors")
    with pytest.raises(CheckpointError, match=r"mine\.safetensors, which is a link to /mnt/unplugged/mine"):
        load_checkpoint(tmp_path / "mine.safetensors")


@pytest.mark.parametrize(
    "name", ["a" * 300, "a/" * 3000, "\ud800", "a\0b", "x" * 10**6, "", ".", "/dev/zero"]
)
@pytest.mark.parametrize("read", [load_checkpoint, read_file, read_header])
def test_names_of_no_file(tmp_path, monkeypatch, name, read):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="there is no file") as caught:
        read(name)
    assert len(str(caught.value)) <= 2000


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="there is no file"):
        load_checkpoint(tmp_path / "x.safetensors")


def test_a_file_that_may_not_be_read(file, monkeypatch):
    """root may read all, so the system's answer is made up."""
    save_file({"a": torch.zeros(1)}, file)

    def refuse(*args, **more):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr("pathlib.Path.open", refuse)
    for read in (load_checkpoint, read_header):
        with pytest.raises(CheckpointError, match="Permission denied"):
            read(file)
