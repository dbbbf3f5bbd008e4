"""Train the demo teacher: ``python -m demo.study.train_teacher --output runs/teacher``.

Two stages, small pictures first: most of what a prompt means is learned at 32x32 at a quarter of the cost,
then 48x48 (the size the model is shipped for) with some 32x32 between. Everything is seeded by step number;
a run that was stopped goes on from its last saved state.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import time
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from scripts.comfy_host import import_pack

from ..words import VOCABULARY
from .diffusion import DrawnBatches, alpha_sigma, picture_weight

SMALL, FULL = 32, 48


def picture_size(step: int, small_steps: int) -> int:
    """Side of the pictures of ``step``: small ones first, later every fifth batch."""
    return SMALL if step < small_steps or step % 5 == 0 else FULL


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100, decay: int = 800) -> float:
    """Warm-up, constant, then a cosine to a twentieth of ``peak`` over the last ``decay`` steps."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = max(0.0, (step - (steps - decay)) / decay)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def initialize(unet: torch.nn.Module) -> None:
    """PyTorch's default initialisation (ComfyUI's layers skip it), and zero for the last layer of every
    branch."""
    for module in unet.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            torch.nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                torch.nn.init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            torch.nn.init.ones_(module.weight)
            torch.nn.init.zeros_(module.bias)
    for name, module in unet.named_modules():
        if name.endswith(("out_layers.3", "proj_out")) or name == "out.2":
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for weights, log and resume state")
    parser.add_argument(
        "--small-steps", type=int, default=2000, help="steps at 32x32 before 48x48 (default 2000)"
    )
    parser.add_argument("--steps", type=int, default=3900, help="all steps (default 3900)")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures per step (default 32)")
    parser.add_argument("--lr", type=float, default=8e-4, help="peak learning rate of AdamW (default 8e-4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, pictures and noise (default 0)")
    parser.add_argument(
        "--save-every", type=int, default=200, help="steps between saved states (default 200)"
    )
    args = parser.parse_args()

    demo_unet = import_module(".nodes.host.demo.unet", import_pack().__name__)
    torch.manual_seed(args.seed)
    unet = demo_unet.DemoConfig().get_model({}).diffusion_model.float().requires_grad_(True)
    initialize(unet)
    words = torch.nn.Embedding(len(VOCABULARY), demo_unet.CONTEXT_DIM)
    model = torch.nn.ModuleDict({"unet": unet, "words": words})
    ema = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    batches = DrawnBatches(args.batch_size, args.seed)

    args.output.mkdir(parents=True, exist_ok=True)
    state_file, log_file = args.output / "state.pt", args.output / "log.csv"
    first = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema, first = state["ema"], state["step"]
    log = log_file.open("a" if first else "w", newline="")
    writer = csv.writer(log)
    if not first:
        writer.writerow(["step", "size", "learning_rate", "loss", "seconds"])

    start = time.perf_counter()
    losses: list[float] = []
    for step in (bar := tqdm(range(first, args.steps), initial=first, total=args.steps, mininterval=10)):
        size = picture_size(step, args.small_steps)
        x0, rows, timesteps, noise = batches(step, size)
        alpha, sigma = alpha_sigma(timesteps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        picture = unet(alpha * x0 + sigma * noise, timesteps.float(), context=words(rows))
        loss = (picture_weight(timesteps) * (picture - x0).square().mean(dim=(1, 2, 3))).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.995, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, value in model.state_dict().items():
                ema[name].lerp_(value, 1 - decay)

        losses.append(loss.item())
        if (step + 1) % 20 == 0:
            mean = sum(losses) / len(losses)
            writer.writerow(
                [
                    step + 1,
                    size,
                    f"{optimizer.param_groups[0]['lr']:.2e}",
                    f"{mean:.5f}",
                    f"{time.perf_counter() - start:.0f}",
                ]
            )
            log.flush()
            bar.set_postfix(loss=f"{mean:.4f}", size=size)
            losses.clear()
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "ema": ema,
                "step": step + 1,
            }
            torch.save(state, state_file.with_suffix(".tmp"))
            os.replace(state_file.with_suffix(".tmp"), state_file)
            half = {name: value.half().contiguous() for name, value in ema.items()}
            metadata = {
                "title": "ΔConv demo teacher",
                "seed": str(args.seed),
                "steps": str(step + 1),
                "license": "Apache-2.0",
            }
            save_file(half, args.output / "teacher.safetensors.tmp", metadata)
            os.replace(args.output / "teacher.safetensors.tmp", args.output / "teacher.safetensors")
    log.close()


if __name__ == "__main__":
    main()
