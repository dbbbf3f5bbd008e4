"""What is imported at the start, in a process of its own: nothing that few programs need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import deltaconv_core
from deltaconv_core.cli import COMMANDS

UNWANTED = {"torch._dynamo", "triton", "torch.utils.flop_counter"} | {
    *("accelerate", "diffusers", "huggingface_hub", "jsonschema", "matplotlib", "PIL", "transformers")
}
CODE = f"""
import contextlib, json, sys
import deltaconv_core
loaded = {{"library": list(sys.modules)}}
from deltaconv_core.cli import main
for command in (None, *{list(COMMANDS)}):
    with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(SystemExit):
        main([*filter(None, [command]), "--help"])
    loaded[command or "help"] = list(sys.modules)
print(json.dumps(loaded))
"""


@pytest.fixture(scope="module")
def loaded():
    """What the process had loaded after importing the library, after --help, and after each command's."""
    root = Path(deltaconv_core.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", CODE], cwd=root, capture_output=True, text=True, check=True)
    return {step: set(modules) for step, modules in json.loads(done.stdout).items()}


def commands(modules):
    return {name for name in COMMANDS if f"deltaconv_core.commands.{name.replace('-', '_')}" in modules}


def test_the_library_loads_neither_the_compiler_nor_triton(loaded):
    assert {"torch", "deltaconv_core.block.module"} <= loaded["library"]
    assert not loaded["library"] & UNWANTED


def test_help_loads_no_command(loaded):
    assert "deltaconv_core.cli" in loaded["help"]
    assert not commands(loaded["help"]) and not loaded["help"] & UNWANTED


def test_a_command_loads_itself_alone(loaded):
    before = loaded["help"]
    for command in COMMANDS:
        assert commands(loaded[command] - before) == {command}
        assert not loaded[command] & UNWANTED
        before = loaded[command]
