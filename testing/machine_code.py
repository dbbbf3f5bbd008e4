"""Kernels compiled for a GPU that is not there, and what their machine code says.

Triton's wheel brings the tools: its own compiler with ptxas, `cuobjdump` for registers and `nvdisasm` for the
instructions. Nothing is launched.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

FLOATS = {"factor", "row_ratio", "col_ratio", "first_rows", "first_cols", "second_rows", "second_cols"}
"""Arguments of our Triton kernels that are neither pointers nor whole numbers."""
SIXTEENS = {"C", "CHANNELS", "weight_stride"}
"""Arguments that are multiples of 16 in every model; so are addresses."""


@dataclass(frozen=True)
class MachineCode:
    """A compiled kernel.

    Args:
        name: of the kernel and its settings.
        instructions: opcodes with their suffixes, in the order of addresses; padding left out.
        loop: first and last place in `instructions` of its longest loop; (0, -1) where there is none.
        registers: of a thread.
        spilled: bytes of a thread's stack.
        shared: bytes of shared memory of a program.
        warps: of a program.
    """

    name: str
    instructions: tuple[str, ...]
    loop: tuple[int, int]
    registers: int
    spilled: int
    shared: int
    warps: int

    @cached_property
    def inside(self) -> Counter[str]:
        """Opcode -> how many of them the longest loop has."""
        return Counter(self.instructions[self.loop[0] : self.loop[1] + 1])

    @cached_property
    def outside(self) -> Counter[str]:
        """The same of the rest."""
        return Counter(self.instructions) - self.inside

    def warps_at_once(self, registers: int = 2**16, shared: int = 227 * 2**10, most: int = 64) -> int:
        """Warps that a multiprocessor holds, by its registers and its shared memory."""
        each = -(-self.registers // 8) * 8 * 32 * self.warps
        programs = min(registers // each, most // self.warps)
        if self.shared:
            programs = min(programs, shared // (self.shared + 1024))
        return programs * self.warps


def mix(counts: Mapping[str, int], most: int = 6) -> str:
    """The commonest instructions, matrix products first: "HMMA.16816 162, ISETP 107, ..."."""
    plain: Counter[str] = Counter()
    for opcode, count in counts.items():
        plain[short(opcode)] += count
    ordered = sorted(plain.most_common(), key=lambda pair: not re.match("HG?MMA", pair[0]))
    return ", ".join(f"{name} {count}" for name, count in ordered[:most])


def short(opcode: str) -> str:
    """An opcode with the suffixes that say what it costs: the width of loads, shape and type of products."""
    name, *suffixes = opcode.split(".")
    kept = [s for s in suffixes if s in ("64", "128", "TF32") or re.fullmatch(r"\d{4,}|\d+x\d+x\d+", s)]
    return ".".join([name, *kept])


def triton_code(
    name: str,
    tuner: Any,
    config: Any,
    pointers: Mapping[str, str],
    constants: Mapping[str, Any],
    sm: int,
) -> MachineCode:
    """Compiles one of our Triton kernels.

    Args:
        name: for the result.
        tuner: triton's autotuner around the kernel.
        config: one of its configurations.
        pointers: argument -> triton's name of the type that it points to, such as "fp16".
        constants: the kernel's constants, without those of the configuration.
        sm: compute capability times ten.
    """
    built = build(tuner, config, pointers, constants, ("cuda", sm, 32))
    return read_cubin(name, built.asm["cubin"], built.metadata.shared, config.num_warps)


def build(
    tuner: Any,
    config: Any,
    pointers: Mapping[str, str],
    constants: Mapping[str, Any],
    target: tuple[str, Any, int],
) -> Any:
    """What triton makes of a kernel, for any target: (backend, architecture, threads of a warp)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {**constants, **config.kwargs}
    signature = {argument: _type(argument, pointers, constants) for argument in tuner.fn.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (argument, kind) in enumerate(signature.items())
        if (argument in pointers or argument in SIXTEENS) and kind != "constexpr"
    }
    source = ASTSource(tuner.fn, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget(*target), options={"num_warps": config.num_warps})


def _type(argument: str, pointers: Mapping[str, str], constants: Mapping[str, Any]) -> str:
    if argument in constants:
        return "constexpr"
    if argument in pointers:
        return f"*{pointers[argument]}"
    return "fp32" if argument in FLOATS else "i32"


def read_cubin(name: str, cubin: bytes, shared: int, warps: int) -> MachineCode:
    """Takes a compiled kernel apart.

    Args:
        name: for the result.
        shared: bytes of shared memory that it is launched with.
        warps: of a program.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _tool("cuobjdump", "-res-usage", file)
        listing = _tool("nvdisasm", "-c", file)
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}
    instructions, loop = parse(listing.splitlines())
    stack, shared = used.get("STACK", 0), max(shared, used.get("SHARED", 0))
    return MachineCode(name, tuple(instructions), loop, used["REG"], stack, shared, warps)


def parse(lines: Iterable[str]) -> tuple[list[str], tuple[int, int]]:
    """The opcodes in nvdisasm's listing, and the first and the last place of the longest loop.

    A loop is what lies between a label and a later branch to it; (0, -1) where there is none. What follows
    the last EXIT is padding.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops = [(0, -1)]
    last = 0
    for line in lines:
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)(.*)", line):
            opcode, rest = found.groups()
            target = re.search(r"`\((\.L_x_\d+)\)", rest)
            if opcode.startswith("BRA") and target and target[1] in labels:
                loops.append((labels[target[1]], len(instructions)))
            instructions.append(opcode)
            if opcode.startswith("EXIT"):
                last = len(instructions)
    inside = [loop for loop in loops if loop[1] < last]
    return instructions[:last], max(inside, key=lambda loop: loop[1] - loop[0])


def _tool(name: str, *arguments: Any) -> str:
    """What one of the tools in triton's wheel prints."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{program} failed: {done.stderr.strip()[-500:]}")
    return done.stdout
