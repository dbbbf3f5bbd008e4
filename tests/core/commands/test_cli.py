"""The command line: what it prints, and one clear line with a non-zero status on bad input."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deltaconv_core
from deltaconv_core import BlockSpec, Checkpoint, DeltaConvBlock, save_checkpoint
from deltaconv_core.cli import COMMANDS, main

SITE = "mid_block.attentions.0.transformer_blocks.0.attn1"


@pytest.fixture
def path(tmp_path):
    spec = BlockSpec(16, 5, (1.0, 1 / 3), gate="sigmoid", depthwise_bias=True)
    blocks = {SITE: DeltaConvBlock(spec, dtype=torch.float16)}
    metadata = {"teacher": "a model", "note": "two\nlines \x1b[31mand a color"}
    checkpoint = Checkpoint("unet-16x1", blocks, {"conv1.weight": torch.zeros(10, 5)}, metadata)
    save_checkpoint(checkpoint, tmp_path / "weights.safetensors")
    return str(tmp_path / "weights.safetensors")


def module(*arguments, **more):
    """Runs `python -m deltaconv_core` as a user does."""
    root = Path(deltaconv_core.__file__).parents[1]
    command = [sys.executable, "-m", "deltaconv_core", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=500, **more)


def test_inspect_prints_a_table(path, capsys):
    assert main(["inspect", path]) == 0
    architecture, head, row, blocks, base, *metadata = capsys.readouterr().out.splitlines()
    assert architecture == "architecture: unet-16x1"
    assert " ".join(head.split()) == "site channels K scales gate merge pooling dtype parameters"
    assert " ".join(row.split()) == f"{SITE} 16 5 + bias 1, 0.3333 sigmoid concat average float16 968"
    assert blocks == "blocks: 1, 968 parameters, 0.0 MB"
    assert base == "base weights: 1 tensors, 50 parameters, 0.0 MB"
    assert metadata == ["teacher: a model", "note: two lines  [31mand a color"]


def test_bad_input_is_one_line_and_status_2(tmp_path):
    path = tmp_path / "a\nb.safetensors"
    path.write_bytes(b"PK\x03\x04 not weights")
    done = module("inspect", str(path))
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    assert "pickle" in done.stderr and "a b.safetensors" in done.stderr


def test_runs_as_a_module_where_the_console_knows_few_letters(path):
    done = module("inspect", path, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and SITE in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["bake"], ["inspect"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "usage:" in capsys.readouterr().err
