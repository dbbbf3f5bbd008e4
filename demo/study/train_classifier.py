"""Train the classifier whose features measure pictures.

    python -m demo.study.train_classifier --output FOLDER

On drawings of prompts that are not held out, two batches of 48 pixels for one of 96, seeded by step number.
Prints how often it names each slot of held-out drawings right.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from ..words import SLOTS, Prompt
from .classifier import SIZES, Classifier, as_tensor, load_classifier, save_classifier, word_numbers
from .drawings import draw, every_prompt, is_held_out, random_scene


def drawings(
    prompts: list[Prompt], number: int, size: int, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """``number`` drawings (N, 3, size, size) of any of the prompts, and the words they show (N, slots)."""
    chosen = [prompts[i] for i in rng.integers(len(prompts), size=number)]
    pictures = np.stack([draw(random_scene(prompt, rng), size) for prompt in chosen])
    return as_tensor(pictures), word_numbers(chosen)


@torch.inference_mode()
def accuracy(classifier: Classifier, size: int, number: int = 1000, seed: int = 1) -> dict[str, float]:
    """Share of held-out drawings whose word in a slot is named right, by slot."""
    prompts = [prompt for prompt in every_prompt() if is_held_out(prompt)]
    pictures, words = drawings(prompts, number, size, np.random.default_rng(seed))
    logits: dict[str, list[torch.Tensor]] = {slot: [] for slot in SLOTS}
    for some in pictures.split(100):
        for slot, values in classifier(some).items():
            logits[slot].append(values)
    return {
        slot: float((torch.cat(logits[slot]).argmax(1) == words[:, i]).float().mean())
        for i, slot in enumerate(SLOTS)
    }


def train(steps: int, batch_size: int, peak: float, seed: int) -> Classifier:
    """A trained classifier; AdamW, learning rate on one cosine cycle."""
    torch.manual_seed(seed)
    classifier = Classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=peak, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, steps, pct_start=0.2)
    prompts = [prompt for prompt in every_prompt() if not is_held_out(prompt)]
    for step in (bar := tqdm(range(steps), mininterval=5)):
        size = SIZES[step % 3 == 2]  # a large picture costs four times as much
        pictures, words = drawings(prompts, batch_size, size, np.random.default_rng((seed, step)))
        losses = [F.cross_entropy(part, words[:, i]) for i, part in enumerate(classifier(pictures).values())]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return classifier


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for classifier.safetensors")
    parser.add_argument("--steps", type=int, default=1800, help="steps (default 1800)")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures per step (default 32)")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate of AdamW (default 4e-3)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of weights, prompts and drawings (default 0)"
    )
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "classifier.safetensors"
    metadata = {
        "title": "Classifier of the demo model's drawings",
        "license": "Apache-2.0",
        "training": f"{args.steps} steps of {args.batch_size} drawings, seed {args.seed}, AdamW {args.lr}",
    }
    save_classifier(train(args.steps, args.batch_size, args.lr, args.seed), file, metadata)
    print(f"{file}: {file.stat().st_size:,} bytes. Words named right on 1000 held-out drawings:")
    print("| pixels | " + " | ".join(SLOTS) + " |")
    print("|---" * (len(SLOTS) + 1) + "|")
    for size in SIZES:
        shares = accuracy(load_classifier(file), size)
        print(f"| {size} | " + " | ".join(f"{share:.3f}" for share in shares.values()) + " |")


if __name__ == "__main__":
    main()
