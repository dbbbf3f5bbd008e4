"""Distil the demo teacher's self-attention: ``python -m demo.train_student --output runs/student``.

First layer-wise: the teacher runs, and every ΔConvBlock learns its own attention's output from its input.
Then end to end with the paper's loss, through the frozen network. Teacher and student are one network in
two modes.
"""

from __future__ import annotations

import argparse
import csv
import time
from importlib import import_module
from pathlib import Path

import torch
from tqdm import tqdm

from deltaconv_core import BlockSpec, Checkpoint, DeltaConvBlock, save_checkpoint
from deltaconv_core.distill import Tap, feature_loss, min_snr_weight, output_losses, tapped, warm_start
from deltaconv_core.distill.losses import BETA
from scripts.comfy_host import import_pack

from .diffusion import DrawnBatches, alpha_sigma
from .files import teacher_file
from .train_teacher import FULL, SMALL, learning_rate

#: Kernel size by U-Net level, wide where the grid is fine, as in the authors' SD1.5 weights.
KERNELS = {"down_blocks.0": 11, "down_blocks.1": 9, "up_blocks.1": 9, "up_blocks.2": 11}
COARSE_KERNEL = 5
EMA = 0.995


def make_blocks(sites: dict, network: torch.nn.Module) -> dict[str, DeltaConvBlock]:
    """A block for every site, started from the attention's own weights."""
    blocks = {}
    for site_id, site in sites.items():
        level = site_id.split(".attentions")[0]
        block = DeltaConvBlock(BlockSpec(site.channels, KERNELS.get(level, COARSE_KERNEL)))
        attention = network.get_submodule(site.path)
        warm_start(block, attention.to_v.weight, attention.to_out[0].weight, attention.to_out[0].bias)
        blocks[site_id] = block
    return blocks


def layer_wise(taps: dict[str, Tap], blocks: dict[str, DeltaConvBlock]) -> dict[str, torch.Tensor]:
    """Every block's error on its own attention's last call; gradients stay inside the block."""
    features = []
    for site_id, tap in taps.items():
        x, grid, y = tap.take()
        features.append((blocks[site_id](x, grid=grid), y))
    return {"feature": feature_loss(*zip(*features, strict=True))}


def run(
    unet: torch.nn.Module, taps: dict[str, Tap], mixing: bool, noisy: torch.Tensor, *inputs: torch.Tensor
):
    """The network's picture of ``noisy``, with its attention or with the blocks."""
    timesteps, context = inputs
    for tap in taps.values():
        tap.mixing = mixing
    return unet(noisy, timesteps.float(), context=context, transformer_options={})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", type=Path, default=teacher_file(), help="the teacher's safetensors file")
    parser.add_argument("--output", type=Path, required=True, help="folder for weights and log")
    parser.add_argument("--layer-steps", type=int, default=500, help="layer-wise steps (default 500)")
    parser.add_argument("--steps", type=int, default=680, help="all steps, the rest end to end (default 680)")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures per step (default 32)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of AdamW (default 1e-3)")
    parser.add_argument("--seed", type=int, default=1, help="seed of blocks, pictures and noise (default 1)")
    args = parser.parse_args()

    pack = import_pack()
    model = import_module(".nodes.host.demo_unet", pack.__name__).load_demo_model(str(args.teacher))
    sites = import_module(".nodes.host.sites", pack.__name__).find_sites(model)
    words = import_module(".nodes.host.demo_unet", pack.__name__).load_words(str(args.teacher))
    network = model.model.requires_grad_(False)
    unet = network.diffusion_model

    torch.manual_seed(args.seed)
    blocks = make_blocks(sites.sites, network)
    ema = make_blocks(sites.sites, network)
    parameters = [p for block in blocks.values() for p in block.parameters()]
    averages = [p for block in ema.values() for p in block.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    batches = DrawnBatches(args.batch_size, args.seed)
    attentions = {site_id: network.get_submodule(site.path) for site_id, site in sites.sites.items()}
    grids = {site_id: site.grid for site_id, site in sites.sites.items()}

    args.output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    totals: dict[str, list[float]] = {}
    with (args.output / "log.csv").open("w", newline="") as log, tapped(attentions, blocks, grids) as taps:
        writer = csv.writer(log)
        writer.writerow(["step", "stage", "learning_rate", "feature", "teacher", "noise", "seconds"])
        for step in (bar := tqdm(range(args.steps), mininterval=10)):
            x0, rows, timesteps, noise = batches(step, SMALL if step % 5 == 0 else FULL)
            alpha, sigma = alpha_sigma(timesteps)
            noisy, context = alpha * x0 + sigma * noise, words[rows]

            with torch.no_grad():
                teacher = run(unet, taps, False, noisy, timesteps, context)
            end_to_end = step >= args.layer_steps
            if end_to_end:
                wanted = [tap.take()[2] for tap in taps.values()]
                student = run(unet, taps, True, noisy, timesteps, context)
                # the paper's losses compare predicted noise; eps = (noisy - alpha * picture) / sigma
                snr = (alpha / sigma).square().flatten()
                losses = output_losses(student, teacher, x0, snr * min_snr_weight(snr))
                losses["feature"] = feature_loss([tap.take()[2] for tap in taps.values()], wanted)
                loss = losses["teacher"] + losses["noise"] + BETA * losses["feature"]
                stage_step, stage_steps = step - args.layer_steps, args.steps - args.layer_steps
            else:
                losses = layer_wise(taps, blocks)
                loss = losses["feature"]
                stage_step, stage_steps = step, args.layer_steps
            rate = learning_rate(stage_step, stage_steps, args.lr, warmup=50, decay=stage_steps // 2)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            with torch.no_grad():
                for average, parameter in zip(averages, parameters, strict=True):
                    average.lerp_(parameter, 1 - min(EMA, (step + 1) / (step + 10)))

            for name, value in losses.items():
                totals.setdefault(name, []).append(value.item())
            if (step + 1) % 20 == 0:
                means = {name: f"{sum(values) / len(values):.5f}" for name, values in totals.items()}
                cells = [means.get(name, "") for name in ("feature", "teacher", "noise")]
                stage = "end to end" if end_to_end else "layer-wise"
                writer.writerow(
                    [step + 1, stage, f"{rate:.2e}", *cells, f"{time.perf_counter() - start:.0f}"]
                )
                log.flush()
                bar.set_postfix(means)
                totals.clear()

    metadata = {
        "title": "ΔConv demo student",
        "teacher": "demo/weights/teacher.safetensors",
        "license": "Apache-2.0",
        "training": f"{args.layer_steps} layer-wise and {args.steps - args.layer_steps} end-to-end steps of "
        f"{args.batch_size} pictures, seed {args.seed}, AdamW {args.lr}",
    }
    half = {site_id: block.half() for site_id, block in ema.items()}
    save_checkpoint(
        Checkpoint(sites.architecture, half, metadata=metadata), args.output / "deltaconv.safetensors"
    )


if __name__ == "__main__":
    main()
