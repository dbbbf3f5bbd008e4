"""One attention of FLUX, Z-Image and Qwen-Image at their real width, beside a joint mixer: time and memory.

    python -m benchmarks.joint [--model flux ...] [--side 64 128 256] [--json FILE]

Random queries, keys and values of one picture, between the projections, which both have: PyTorch's attention
of text and image to both, and a `JointMixer` of the default form (256 landmarks, kernels of 9 x 9), its
kernels random. Runs take turns; medians. An attention's time grows with the number of its queries, so beyond
--whole tokens only that many of them are timed, with all keys, and the time is scaled; the table marks such
times with ~. Peak memory is above that of queries, keys and values; of an attention that ran in part it is
not known.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaconv_core import bench
from deltaconv_core.mixers.joint import JointLayout, JointMixer, JointSpec
from deltaconv_core.mixers.joint.flops import joint_flops
from deltaconv_core.mixers.joint.module import attention
from deltaconv_core.util.text import markdown

from .harness import Results, add_machine, circumstances, parser, peak

SIDES = (64, 128, 256)


@dataclass(frozen=True)
class Family:
    """One attention of a model.

    Args:
        heads, head_dim: of queries, keys and values.
        text: tokens of a usual prompt.
    """

    heads: int
    head_dim: int
    text: int

    @property
    def spec(self) -> JointSpec:
        """Of the mixer that is measured."""
        return JointSpec(self.heads * self.head_dim, self.heads, self.head_dim)


FAMILIES = {"flux": Family(24, 128, 512), "z_image": Family(30, 128, 128), "qwen_image": Family(24, 128, 256)}
SMALL = Family(2, 16, 8)


def main() -> int:
    command = parser(__doc__)
    command.add_argument("--model", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="MODEL")
    command.add_argument("--side", type=int, nargs="+", default=list(SIDES), help="of the square of tokens")
    command.add_argument(
        "--whole", type=int, default=20000, help="tokens up to which all queries are timed (%(default)s)"
    )
    add_machine(command, repeats=3)
    args = command.parse_args()
    torch.manual_seed(0)
    device = bench.pick_device(args.device)
    dtype = bench.pick_dtype(args.dtype, device)
    sides = [max(2, side // 8) for side in args.side] if args.small else args.side
    results = Results(args.json, circumstances(device, dtype, args.small))
    rows = []
    for side in sides:
        for name in args.model:
            key = {"model": name, "side": side}
            row = results.find(**key)
            if row is None:
                family = SMALL if args.small else FAMILIES[name]
                row = results.add(key | measure(family, side, args.whole, args.repeats, device, dtype))
            rows.append(row)
            print(f"{name}, {side} x {side} tokens: {row['ratio']:.1f} x", flush=True)
    print("\n" + "\n".join(table(rows)))
    return 0


@torch.no_grad()
def measure(
    family: Family, side: int, whole: int, repeats: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """One row: seconds, bytes, and operations of attention and mixer, and how often one takes the other's
    time."""
    layout = JointLayout((side, side), start=family.text)
    tokens = family.text + layout.tokens
    q, k, v = (
        torch.randn(1, family.heads, tokens, family.head_dim, device=device, dtype=dtype) for _ in range(3)
    )
    mixer = JointMixer(family.spec, device, dtype)
    for parameter in mixer.parameters():
        parameter.normal_(std=0.1)
    asked = q if tokens <= whole else q[:, :, torch.randperm(tokens, device=device)[:whole]]

    def attending() -> Tensor:
        return attention(asked, k, v, None)

    def mixing() -> Tensor:
        return mixer(q, k, v, layout)

    taken = bench.alternate({"attention": attending, "mixer": mixing}, device, repeats)
    seconds = {name: statistics.median(times) for name, times in taken.items()}
    seconds["attention"] *= tokens / asked.shape[2]
    return {
        "tokens": tokens,
        "timed_queries": asked.shape[2],
        "seconds": seconds,
        "ratio": seconds["attention"] / seconds["mixer"],
        "bytes": {
            "attention": peak(attending, device) if asked is q else None,
            "mixer": peak(mixing, device),
        },
        "flops": {
            "attention": joint_flops(None, layout.grid, family.text, family.spec.inner),
            "mixer": joint_flops(family.spec, layout.grid, family.text),
        },
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """In Markdown, a line for each row."""
    lines = []
    for row in rows:
        part = "~" if row["timed_queries"] < row["tokens"] else ""
        seconds, memory, flops = row["seconds"], row["bytes"], row["flops"]
        lines.append(
            {
                "model": row["model"],
                "image tokens": f"{row['side']} x {row['side']}",
                "attention, s": f"{part}{seconds['attention']:.3g}",
                "mixer, s": f"{seconds['mixer']:.3g}",
                "faster": f"{part}{row['ratio']:.1f} x",
                "operations": f"{flops['attention'] / flops['mixer']:.1f} x less",
                "attention, MiB": _mib(memory["attention"]),
                "mixer, MiB": _mib(memory["mixer"]),
                "KiB a token": ""
                if memory["mixer"] is None
                else f"{memory['mixer'] / row['tokens'] / 1024:.1f}",
            }
        )
    return markdown(lines)


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.0f}"


if __name__ == "__main__":
    sys.exit(main())
