"""Places that cannot be written to are one line and status 2, before any work is done."""

from __future__ import annotations

import os
import sys

import pytest

from deltaconv_core import BlockSpec, Checkpoint, DeltaConvBlock, save_checkpoint
from deltaconv_core.cli import main
from deltaconv_core.commands.writable import check_file, check_folder
from deltaconv_core.errors import DeltaConvError

SITE = "mid_block.attentions.0.transformer_blocks.0.attn1"


@pytest.fixture
def path(tmp_path):
    blocks = {SITE: DeltaConvBlock(BlockSpec(16, 3))}
    save_checkpoint(Checkpoint("unet-16x1", blocks), tmp_path / "weights.safetensors")
    return str(tmp_path / "weights.safetensors")


def refused(capsys, *arguments):
    """What one line says."""
    assert main([*map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and printed.err.startswith("error: ")
    return printed.err


@pytest.fixture
def no_work(monkeypatch):
    """Whatever takes long fails the test."""

    def work(*args, **more):
        pytest.fail("it worked before it looked")

    monkeypatch.setattr("deltaconv_core.bench.measure_layers", work)
    monkeypatch.setattr("deltaconv_core.commands.convert.load_checkpoint", work)
    monkeypatch.setattr("deltaconv_core.commands.locality._load", work)
    monkeypatch.setitem(sys.modules, "deltaconv_core.diffusers.distill.run", None)


def command(name, place, path):
    """A command line that writes to `place`."""
    return {
        "bench": ["bench", "--size", "64", "--repeats", "1", "--json", place],
        "convert": ["convert", path, place],
        "convert authors": ["convert", path, place, "--form", "authors"],
        "convert diffusers": ["convert", path, place, "--form", "diffusers"],
        "distill": ["distill", "--model", "m", "--data", "d", "--output", place],
        "distill cache": ["distill", "--model", "m", "--data", "d", "--cache", place],
        "locality": ["locality", "model", "--output", place],
    }[name]


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    "name",
    ["bench", "convert", "convert authors", "convert diffusers", "distill", "distill cache", "locality"],
)
@pytest.mark.parametrize(
    "place", ["under a file", "too long", "too long below", "zero", "half a letter", "loop"]
)
def test_places_that_cannot_be(path, tmp_path, capsys, name, place):
    (tmp_path / "loop").symlink_to("loop")
    ending = "" if name in ("convert diffusers", "distill", "distill cache", "locality") else ".safetensors"
    given = {
        "under a file": f"{path}/x",
        "too long": str(tmp_path / ("x" * 250)),
        "too long below": str(tmp_path / "new" / ("x" * 300) / "x"),
        "zero": str(tmp_path / "a\0b"),
        "half a letter": str(tmp_path / "\ud800"),
        "loop": str(tmp_path / "loop" / "x"),
    }[place]
    before = sorted(tmp_path.iterdir())
    assert "cannot write to" in refused(capsys, *command(name, given + ending, path))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", ["bench", "convert", "convert authors"])
def test_files_need_a_folder_that_is_there(path, tmp_path, capsys, name):
    told = refused(capsys, *command(name, str(tmp_path / "gone" / "x.safetensors"), path))
    assert "cannot write to" in told and "No such file or directory" in told
    (tmp_path / "x.safetensors").mkdir()
    assert "is a folder" in refused(capsys, *command(name, str(tmp_path / "x.safetensors"), path))


def test_a_folder_that_may_not_be_written_to(tmp_path, monkeypatch):
    """root may write everywhere, so the system's answer is made up."""

    def full(*args, **more):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.open", full)
    for check in (check_file, check_folder):
        with pytest.raises(
            DeltaConvError, match=r"--x: cannot write to .*Read-only file system; choose another"
        ):
            check(tmp_path / "a", "--x")


def test_what_can_be_written_is_left_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").write_text("x")
    for place in (tmp_path / "new", tmp_path / "old", type(tmp_path)("relative.json")):
        check_file(place, "--x")
    for place in (tmp_path, tmp_path / "new" / "deep" / "deeper", type(tmp_path)("."), type(tmp_path)("a/b")):
        check_folder(place, "--x")
    assert [file.name for file in tmp_path.iterdir()] == ["old"] and (tmp_path / "old").read_text() == "x"


@pytest.mark.parametrize("output", ["x.ckpt", "x.pt", "x", "x.safetensors.bin", "x.SAFETENSORS.pth"])
@pytest.mark.parametrize("form", ["deltaconv", "authors"])
def test_safetensors_are_not_written_under_another_ending(path, tmp_path, capsys, output, form):
    told = refused(capsys, "convert", path, tmp_path / output, "--form", form)
    assert "expected OUT to end with .safetensors" in told
    assert [file.name for file in tmp_path.iterdir()] == ["weights.safetensors"]


@pytest.mark.parametrize("form", ["deltaconv", "authors", "diffusers"])
@pytest.mark.parametrize(
    "text",
    [
        "architecture=sdxl",
        "architecture=",
        "format=2",
        "specs={}",
        "deltaconv={}",
        "gate=sigmoid",
        "scales=[1]",
    ],
)
def test_metadata_does_not_contradict_the_blocks(path, tmp_path, capsys, form, text):
    out = tmp_path / "out.safetensors"
    told = refused(capsys, "convert", path, out, "--form", form, "--metadata", "title=x", "--metadata", text)
    assert f"--metadata {text} would contradict the blocks, which are of unet-16x1" in told
    assert not out.exists()


def test_metadata_may_repeat_the_architecture(path, tmp_path):
    out = str(tmp_path / "out.safetensors")
    assert main(["convert", path, out, "--metadata", "architecture=unet-16x1"]) == 0


@pytest.mark.parametrize("command", ["inspect", "bench", "convert"])
@pytest.mark.parametrize(
    "name", ["a" * 300, "a/" * 3000, "b" * 300 + "/x.safetensors", "a\0b", "\ud800", "loop"]
)
def test_inputs_that_cannot_be_reached(tmp_path, monkeypatch, capsys, command, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    more = ["out.safetensors"] if command == "convert" else []
    told = refused(capsys, command, name, *more)
    assert len(told) < 2100
    assert os.listdir(tmp_path) == ["loop"]
