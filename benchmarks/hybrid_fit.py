"""What fitting hybrid mixers to a whole U-Net takes, on the CPU: memory above the model, and time.

    python -m benchmarks.hybrid_fit [--latent 64] [--passes 3] [--landmarks 16 64 144] [--small]

diffusers' own class in SD 1.5's size with random float32 weights, which say nothing about quality. Passes of
two samples run plainly, then watched by a fit of one mixer for each number of landmarks at every site (by
head, 5 x 5 kernels at two scales and the mean: the largest sums that are likely). Prints the peak of the
process's memory above the model for both, what the fit's sums take as computed beforehand, and the median
seconds of a pass. Exits with status 1 when the fit takes 1 GiB or more beyond what a plain pass takes. Memory
is read from /proc, so on Linux.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable

import torch

from deltaconv_core.diffusers.sites import find_sites
from deltaconv_core.diffusers.watch import watched
from deltaconv_core.distill.hybrid import FitSettings, HybridFit, sums_bytes
from deltaconv_core.mixers.hybrid import HybridSpec
from scripts.comfy_host import prepare_torchvision

from .harness import highest, parser, resident, trim

LIMIT = 2**30
MIB = 2**20
CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"


def main() -> int:
    command = parser(__doc__)
    command.add_argument("--latent", type=int, default=64, help="side of the latent (%(default)s)")
    command.add_argument("--passes", type=int, default=3, help="of each kind (%(default)s)")
    command.add_argument("--landmarks", type=int, nargs="+", default=[16, 64, 144], help="(%(default)s)")
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
    x, context = torch.randn(2, 4, side, side), torch.randn(2, 77, 768 // part)

    def one() -> None:
        with torch.no_grad():
            model(x, 500, encoder_hidden_states=context)

    candidates = {
        site: [
            HybridSpec(
                found.channels[site],
                attention.heads,
                found.channels[site] // attention.heads,
                landmarks=landmarks,
                kernel_size=5,
                scales=(1.0, 0.5),
                mean=True,
            )
            for landmarks in args.landmarks
        ]
        for site, attention in found.attentions.items()
    }
    fit = HybridFit(candidates, FitSettings())

    def fitting() -> None:
        fit.picture(fit.pictures)
        with watched(found, candidates, fit.see):
            one()

    trim()
    gc.collect()
    before = resident()
    plain = measure(one, args.passes, before)
    trim()
    fitted = measure(fitting, args.passes, before)
    sums = sums_bytes([spec for specs in candidates.values() for spec in specs])
    print(f"{len(candidates)} sites, {side} x {side}, {len(args.landmarks)} mixers at each")
    for name, (peak, seconds) in (("plain", plain), ("fitting", fitted)):
        print(f"a pass, {name}: {peak / MIB:,.0f} MiB above the model, {seconds:.2f} s")
    print(f"the fit: {(fitted[0] - plain[0]) / MIB:,.0f} MiB more; its sums take {sums / MIB:,.0f} MiB")
    return int(fitted[0] - plain[0] >= LIMIT)


def measure(run: Callable[[], None], passes: int, before: int) -> tuple[int, float]:
    """The most bytes above those before, and the median seconds."""
    seconds: list[float] = []

    def all_passes() -> None:
        for _ in range(passes):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)

    return highest(all_passes) - before, statistics.median(seconds)


if __name__ == "__main__":
    sys.exit(main())
