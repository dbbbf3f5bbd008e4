"""What converting a whole U-Net takes, on the CPU: time in forward passes, and memory above the model.

    python -m benchmarks.hybrid_fit [--latent 64] [--pictures 8] [--steps 4] [--small]

diffusers' own class in SD 1.5's size with random float32 weights, which say nothing about quality. One pass
of a sample runs plainly; then the conversion of `deltaconv_core.distill.conversion`, with the mixers and the
numbers of pictures and steps that ΔConv Convert Model has, runs from the first pass to the choice. Prints
how long it takes in units of a pass of the same run without the fit, the peak of the process's memory above
the model for both, and what the sums of the fit take as computed beforehand. Exits with status 1 when the
conversion takes more than 60 passes, or 1 GiB or more above the model. Memory is read from /proc, so on
Linux.
"""

from __future__ import annotations

import gc
import sys
import time

import torch

from deltaconv_core.diffusers.sites import find_sites
from deltaconv_core.diffusers.watch import watched
from deltaconv_core.distill.conversion import Wishes, candidates, fit_and_choose
from deltaconv_core.distill.hybrid_sums import sums_bytes
from scripts.comfy_host import prepare_torchvision

from .harness import highest, parser, resident, trim

MOST_BYTES, MOST_PASSES = 2**30, 60
MIB = 2**20
CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"


def main() -> int:
    command = parser(__doc__)
    command.add_argument("--latent", type=int, default=64, help="side of the latent (%(default)s)")
    command.add_argument("--pictures", type=int, default=8, help="(%(default)s)")
    command.add_argument("--steps", type=int, default=4, help="of each (%(default)s)")
    command.add_argument("--small", action="store_true", help="an eighth of the channels and of the side")
    args = command.parse_args()
    prepare_torchvision()  # diffusers imports it by way of transformers
    from diffusers import UNet2DConditionModel

    part = 8 if args.small else 1
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        block_out_channels=tuple(channels // part for channels in (320, 640, 1280, 1280)),
        down_block_types=(CROSS, CROSS, CROSS, PLAIN),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        cross_attention_dim=768 // part,
        norm_num_groups=32 // part,
        attention_head_dim=8,  # diffusers' name for the number of heads here
    )
    model.eval().requires_grad_(False)
    found = find_sites(model)
    side = max(8, args.latent // part)
    context = torch.randn(1, 77, 768 // part)

    drawn: list[float] = []  # when each picture was done

    def one_pass(seed: int, step: int) -> None:
        x = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            model(x, 1000 * (step + 0.5) / args.steps, encoder_hidden_states=context)

    def sample(number: int) -> None:
        for step in reversed(range(args.steps)):
            one_pass(number, step)
        drawn.append(time.perf_counter())
        print(f"picture {number + 1} of {args.pictures}", file=sys.stderr, flush=True)

    sites = {
        site: candidates(found.channels[site], attention.heads, found.channels[site] // attention.heads)
        for site, attention in found.attentions.items()
    }
    done = []

    def converting() -> None:
        wishes = Wishes("speed", 0.5, args.pictures)
        done.append(fit_and_choose(sites, lambda see: watched(found, sites, see), sample, wishes))

    trim()
    gc.collect()
    before = resident()
    plain = highest(lambda: one_pass(0, 0)) - before
    trim()
    start = time.perf_counter()
    peak = highest(converting) - before
    seconds = time.perf_counter() - start
    (result,) = done
    a_pass = result.picture / args.steps
    sums = sums_bytes([spec for specs in sites.values() for spec in specs])
    print(f"{len(sites)} sites, {side} x {side}, {args.pictures} pictures of {args.steps} steps")
    print(f"a pass: {plain / MIB:,.0f} MiB above the model, {a_pass:.2f} s")
    print(f"the conversion: {peak / MIB:,.0f} MiB above the model, of which sums {sums / MIB:,.1f} MiB")
    fitting = drawn[-1] - start
    print(
        f"the conversion: {seconds / a_pass:.1f} passes ({seconds:,.0f} s); {fitting / a_pass:.1f} while it "
        f"samples, for {args.pictures * args.steps}, and {(seconds - fitting) / a_pass:.1f} to solve and time"
    )
    print(
        f"{len(result.mixers)} layers are replaced; a picture takes {result.picture:.1f} s before, "
        f"{result.seconds[1]:.1f} s after"
    )
    return int(peak >= MOST_BYTES or seconds > MOST_PASSES * a_pass)


if __name__ == "__main__":
    sys.exit(main())
