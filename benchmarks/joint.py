"""One attention of FLUX, Z-Image and Qwen-Image at their real width, beside joint mixers: time and memory.

    python -m benchmarks.joint [--model flux ...] [--side 64 128 256] [--json FILE]

Random queries, keys and values of one picture, between the projections, which both have: PyTorch's attention
of text and image to both, and two `JointMixer`s: "kernels", the default form with 256 landmarks and random
9 x 9 kernels, and "window", 64 landmarks and a window of 7 x 7. Runs take turns; medians. An attention's time
grows with the number of its queries, so beyond --whole tokens only that many of them are timed, with all
keys, and the time is scaled; the table marks such times with ~. Peak memory is above that of queries, keys
and values; of an attention that ran in part it is not known.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
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

    def spec(self, form: str) -> JointSpec:
        """Of a mixer that is measured."""
        return JointSpec(self.heads * self.head_dim, self.heads, self.head_dim, **FORMS[form])


FORMS: dict[str, dict[str, int]] = {
    "kernels": {},
    "window": {"landmarks": 64, "window": 7, "kernel_size": 0},
}
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
            told = ", ".join(f"{form} {row['ratio'][form]:.1f} x" for form in FORMS)
            print(f"{name}, {side} x {side} tokens: {told}", flush=True)
    print("\n" + "\n".join(table(rows)))
    return 0


@torch.no_grad()
def measure(
    family: Family, side: int, whole: int, repeats: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """One row: seconds, bytes, and operations of attention and mixers, and how often the first takes the
    others' time."""
    layout = JointLayout((side, side), start=family.text)
    tokens = family.text + layout.tokens
    q, k, v = (
        torch.randn(1, family.heads, tokens, family.head_dim, device=device, dtype=dtype) for _ in range(3)
    )
    asked = q if tokens <= whole else q[:, :, torch.randperm(tokens, device=device)[:whole]]

    def attending() -> Tensor:
        return attention(asked, k, v, None)

    def mixing(form: str) -> Callable[[], Tensor]:
        mixer = JointMixer(family.spec(form), device, dtype)
        for parameter in mixer.parameters():
            parameter.normal_(std=0.1)
        return lambda: mixer(q, k, v, layout)

    mixers = {form: mixing(form) for form in FORMS}
    taken = bench.alternate({"attention": attending, **mixers}, device, repeats)
    seconds = {name: statistics.median(times) for name, times in taken.items()}
    seconds["attention"] *= tokens / asked.shape[2]
    specs = {form: family.spec(form) for form in FORMS}
    dense = joint_flops(None, layout.grid, family.text, specs["kernels"].inner)
    return {
        "tokens": tokens,
        "timed_queries": asked.shape[2],
        "seconds": seconds,
        "ratio": {form: seconds["attention"] / seconds[form] for form in FORMS},
        "bytes": {
            "attention": peak(attending, device) if asked is q else None,
            **{form: peak(mix, device) for form, mix in mixers.items()},
        },
        "flops": {
            "attention": dense,
            **{form: joint_flops(spec, layout.grid, family.text) for form, spec in specs.items()},
        },
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """In Markdown, a line for each row."""
    lines = []
    for row in rows:
        part = "~" if row["timed_queries"] < row["tokens"] else ""
        seconds, memory, flops = row["seconds"], row["bytes"], row["flops"]
        of_attention = {
            "model": row["model"],
            "image tokens": f"{row['side']} x {row['side']}",
            "attention, s": f"{part}{seconds['attention']:.3g}",
            "attention, MiB": _mib(memory["attention"]),
        }
        lines += [
            of_attention
            | {
                "mixer": form,
                "mixer, s": f"{seconds[form]:.3g}",
                "faster": f"{part}{row['ratio'][form]:.1f} x",
                "operations": f"{flops['attention'] / flops[form]:.1f} x less",
                "mixer, MiB": _mib(memory[form]),
                "KiB a token": "" if memory[form] is None else f"{memory[form] / row['tokens'] / 1024:.1f}",
            }
            for form in FORMS
        ]
    return markdown(lines)


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.0f}"


if __name__ == "__main__":
    sys.exit(main())
