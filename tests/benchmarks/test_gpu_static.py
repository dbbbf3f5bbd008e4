"""Machine code as nvdisasm prints it, and what the model of `benchmarks.gpu_static` makes of it."""

from __future__ import annotations

import importlib.util
import json
import os
import sys

import pytest

from benchmarks import gpu_static
from deltaconv_core import BlockSpec
from testing.machine_code import MachineCode, mix, parse

H100 = gpu_static.GPUS[90]
LISTING = """
.text._kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P4 BRA `(.L_x_1) ;
.L_x_0:
        /*0020*/                   LDG.E.64 R2, desc[UR4][R2.64] ;
        /*0030*/               @P0 HMMA.16816.F32 R4, R4, R6, R4 ;
        /*0040*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0050*/                   FFMA R1, R1, R2, R3 ;
        /*0060*/                   EXIT ;
.L_x_2:
        /*0070*/                   BRA `(.L_x_2);
        /*0080*/                   NOP;
""".splitlines()


def code(instructions, loop=(0, -1), **changed):
    sizes = {"registers": 255, "spilled": 0, "shared": 0, "warps": 8} | changed
    return MachineCode("kernel", tuple(instructions), loop, **sizes)


def test_the_loop_lies_between_a_label_and_the_branch_back():
    instructions, loop = parse(LISTING)
    assert instructions == ["LDC", "BRA", "LDG.E.64", "HMMA.16816.F32", "BRA", "FFMA", "EXIT"]
    assert loop == (2, 4)
    read = code(instructions, loop)
    assert read.inside.total() == 3 and read.outside.total() == 4
    assert mix(read.inside) == "HMMA.16816 1, LDG.64 1, BRA 1"


def test_a_kernel_may_have_no_loop():
    instructions, loop = parse(["  /*0000*/  FADD R1, R1, R2 ;", "  /*0010*/  EXIT ;"])
    assert code(instructions, loop).inside.total() == 0


@pytest.mark.parametrize(
    ("registers", "shared", "warps"), [(255, 0, 8), (128, 0, 16), (40, 0, 48), (32, 0, 64), (64, 65536, 24)]
)
def test_registers_and_shared_memory_limit_the_warps_of_a_multiprocessor(registers, shared, warps):
    assert code([], registers=registers, shared=shared).warps_at_once() == warps


def test_instructions_bytes_and_products_limit_a_kernel():
    busy = code(["FFMA"] * 1000, (0, 999))
    one_each = gpu_static.seconds(H100, busy, 132, 100, 0)
    assert one_each == pytest.approx(2 * 100_000 / 1.755e9)  # 8 warps on 4 schedulers
    assert gpu_static.seconds(H100, busy, 133, 100, 0) == pytest.approx(2 * one_each)
    assert gpu_static.seconds(H100, busy, 132, 100, 3e9) == pytest.approx(1e-3)
    tensor = code(["HMMA.16816.F32"] * 10, (0, 9))
    assert gpu_static.seconds(H100, tensor, 132, 1000, 0) == pytest.approx(2 * 10_000 * 6.5 / 1.755e9)
    assert gpu_static.seconds(H100, code([]), 1, 0, 0) == gpu_static.TINY


@pytest.mark.parametrize(
    ("side", "channels", "K", "microseconds"),
    [(64, 640, 9, 9), (128, 640, 9, 36), (128, 320, 5, 14), (256, 1152, 13, 476)],
)
def test_the_bound_is_bytes_or_operations(side, channels, K, microseconds):
    assert 1e6 * gpu_static.bound(H100, BlockSpec(channels, K), side) == pytest.approx(microseconds, abs=0.5)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="kernels are interpreted")
def test_kernels_and_blocks_are_listed(monkeypatch, capsys, tmp_path):
    file = tmp_path / "static.json"
    options = ["--sm", "90", "--dtype", "bfloat16", "--kernel-size", "3", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["gpu_static", *options])
    assert gpu_static.main() == 0
    printed = capsys.readouterr().out
    assert "| depthwise bf16 K3 4/64/32/2" in printed and "HGMMA" in printed
    assert "| project planes bf16" in printed
    blocks = json.loads(file.read_text())["blocks"]
    assert [(row["side"], row["channels"]) for row in blocks] == gpu_static.BLOCKS
    assert all(
        row["block"] > row["depthwise"] > gpu_static.TINY and row["block"] > row["bound"] for row in blocks
    )
