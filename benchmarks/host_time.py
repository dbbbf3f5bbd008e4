"""How much of the CPU's time a block's forward takes on a GPU, measured without one.

    python -m benchmarks.host_time [--repeats 300] [--dim 64] [--kernel-size 9] [--json FILE]

A GPU computes nothing before Python has launched it: where a block's kernels take less time than Python needs
for them, the GPU waits. This runs the block by Triton's kernels, compiled for an H100 that is not there, on
tokens so few that PyTorch's own operations cost next to nothing but their calls. Prints

- the microseconds of a forward in inference, and of each of its steps: the least of so many calls, because
  whatever else runs only adds to it. Each step is timed in calls of its own;
- how many kernels of Triton's are launched, and how many operations of PyTorch's would launch one.

What the GPU's driver adds to each launch is not in it, nor is what PyTorch for CUDA needs beyond PyTorch on a
CPU: `benchmarks.gpu` shows both, as `host` in its step `blocks`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deltaconv_core import BlockSpec, DeltaConvBlock
from deltaconv_core.block import steps
from deltaconv_core.block.ops.triton import by_triton
from deltaconv_core.util.text import markdown
from testing.without_gpu import stand_in

from .harness import circumstances, parser

GRID = (4, 4)
PACKAGE = "deltaconv_core.block.ops.triton"


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints the table."""
    command = parser(__doc__)
    command.add_argument("--repeats", type=int, default=300, help="timed calls (%(default)s)")
    command.add_argument("--dim", type=int, default=64, help="channels of the tokens (%(default)s)")
    command.add_argument("--kernel-size", type=int, default=9, help="K (%(default)s)")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    given = command.parse_args(arguments)
    figures = measured(BlockSpec(given.dim, given.kernel_size), given.repeats)
    print("\n".join(table(figures)))
    if given.json:
        given.json.write_text(json.dumps(circumstances() | figures, indent=1) + "\n", encoding="utf-8")
    return 0


def measured(spec: BlockSpec, repeats: int) -> dict[str, Any]:
    """Of a block's forward: "us", "steps" (name -> µs), "launches", "operations" (names)."""
    block = DeltaConvBlock(spec).eval().requires_grad_(False)
    x = torch.randn(1, GRID[0] * GRID[1], spec.dim)

    def call() -> None:
        block(x, GRID)

    with stand_in() as launches, torch.inference_mode():
        for _ in range(3):
            call()
        launches.number = 0
        call()
        figures: dict[str, Any] = {"launches": launches.number}
        return figures | {
            "us": least(call, repeats),
            "steps": {name: least_within(call, repeats, *place) for name, place in places().items()},
            "operations": operations(call),
        }


def places() -> dict[str, tuple[Any, str]]:
    """What a block's forward calls in inference: name -> owner and attribute."""
    inference = import_module(f"{PACKAGE}.inference")
    return {
        "check of the tokens": (DeltaConvBlock, "_check"),
        "choice of backend": (steps.ops, "at_once_backend_for"),
        "weights": (steps, "_cast"),
        "up-projection": (inference.F, "linear"),
        "Triton's launches": (inference.Tape, "played"),
    }


def least(call: Callable[[], None], repeats: int) -> float:
    """µs of the fastest of so many calls."""
    taken = []
    for _ in range(repeats):
        begun = time.perf_counter_ns()
        call()
        taken.append(time.perf_counter_ns() - begun)
    return min(taken) / 1000


def least_within(call: Callable[[], None], repeats: int, owner: Any, attribute: str) -> float:
    """µs that a call spends in one function of `owner`, the least of so many calls."""
    original, clock, taken = getattr(owner, attribute), [0], []
    now = time.perf_counter_ns

    def timed(*arguments: Any) -> Any:
        begun = now()
        try:
            return original(*arguments)
        finally:
            clock[0] += now() - begun

    with patch.object(owner, attribute, timed):
        for _ in range(repeats):
            clock[0] = 0
            call()
            taken.append(clock[0])
    return min(taken) / 1000


NOTHING_TO_COMPUTE = ("empty", "empty_like", "new_empty", "_unsafe_view", "promote_types")


class Recorder(TorchDispatchMode):
    """Keeps the names of operations that compute something: no views, and no memory without content."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if not function.is_view and name not in NOTHING_TO_COMPUTE:
            self.names.append(name)
        return function(*arguments, **(named or {}))


def operations(call: Callable[[], None]) -> list[str]:
    """The operations of PyTorch's that would launch a kernel."""
    # In inference mode a dispatch mode sees `linear` and not what that does; and no block is to take another
    # path because a mode is looking.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        patch.object(by_triton, "operators_wanted", lambda arguments: False),
        Recorder() as recorder,
    ):
        call()
    return recorder.names


def table(figures: dict[str, Any]) -> list[str]:
    """The figures as a table, and what is launched below it."""
    steps_us = figures["steps"]
    rest = figures["us"] - sum(steps_us.values())
    rows = [{"step": name, "µs": f"{us:.1f}"} for name, us in (steps_us | {"the rest": rest}).items()]
    rows.append({"step": "a forward", "µs": f"{figures['us']:.1f}"})
    names = figures["operations"]
    return [
        *markdown(rows),
        "",
        f"{figures['launches']} launches of Triton's, {len(names)} of PyTorch's: {', '.join(names)}",
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
