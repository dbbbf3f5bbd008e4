"""Train the demo teacher: ``python -m demo.study.train_teacher --output runs/teacher``.

Pictures of several sizes, most of them 48x48, the size the model is shipped for. The learning rate stays
where it is until the last part of the run, ``--decay``, so that a run can be stopped and resumed at any time:
it saves its state, and so it does at Ctrl-C and SIGTERM. Everything is seeded by step number. From time to
time the averaged weights draw prompts that training never sees, and ``curve.csv`` tells how many words the
detector found in the pictures.

On a GPU, with a time instead of a number of steps:

    python -m demo.study.train_teacher --output runs/teacher --device cuda --batch-size 512 --minutes 4

``--model joint`` trains the demo's other model in the same way: a NextDiT, the class of Lumina 2 and Z-Image.
With ``--guide FILE`` the targets are not the drawings but what the U-Net in the file sees in their noise, and
the word embedding is the U-Net's.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm import tqdm

from deltaconv_core.util.whole_file import replacing
from scripts import comfy_host

from ..words import SLOTS, VOCABULARY
from .device import add_device, use_device
from .diffusion import FULL, alpha_sigma
from .evaluate import Settings, Size, sample
from .lessons import Lesson, Lessons
from .metrics import held_out_prompts, word_shares, words_right
from .muon import Muon


def learning_rate(step: int, left: float, peak: float, decay: float, warmup: int = 100) -> float:
    """Warm-up over the first steps, constant, then a straight line to zero over the last ``decay`` of the
    training, of which ``left`` is still to come (both as parts of one)."""
    falling = left / decay if decay else 1.0
    return peak * min((step + 1) / warmup, falling, 1.0)


def initialize(network: torch.nn.Module) -> None:
    """PyTorch's default initialisation (ComfyUI's layers skip it), and zero for the last layer of every
    branch, or for what its modulation, which the branch is multiplied with, comes from."""
    for module in network.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            torch.nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                torch.nn.init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm, torch.nn.RMSNorm)):
            if module.weight is not None:
                torch.nn.init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                torch.nn.init.zeros_(module.bias)
    for name, module in network.named_modules():
        last = name.endswith(("out_layers.3", "proj_out")) or name in ("out.2", "final_layer.linear")
        if last or (isinstance(module, torch.nn.Linear) and "adaLN_modulation" in name):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    for name, parameter in network.named_parameters():
        if name.endswith("pad_token"):
            torch.nn.init.normal_(parameter, std=0.02)


OTHER_SHAPES = 0.5
"""Part of a guided training's pictures that come with the word of a random shape. Noisy pictures tell their
shape themselves, so without that the word is learnt last."""

EDGES = ("words.", "unet.input_blocks.0.", "unet.out.", "unet.x_embedder.", "unet.final_layer.linear.")


def optimizers(model: torch.nn.ModuleDict, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the weights inside the network; AdamW for first and last layer, words, norms and biases."""
    inner, others = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        edge = name.startswith(EDGES) or name.endswith("pad_token")
        (others if edge or parameter.ndim < 2 else inner).append(parameter)
    return [Muon(inner, rate), torch.optim.AdamW(others, rate, betas=(0.9, 0.99), weight_decay=0.0)]


class Gradients:
    """Gradients of a lesson's loss, its parts spread over single-threaded workers.

    Faster than PyTorch's own threads where other programs use the processor: nobody waits at every layer.
    """

    def __init__(
        self, model: torch.nn.ModuleDict, threads: int, guide: torch.nn.ModuleDict | None = None
    ) -> None:
        self.model, self.guide, self.parts = model, guide, 2 * threads
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def __call__(self, lesson: Lesson) -> torch.Tensor:
        """Set every parameter's ``grad``; returns the loss."""
        parts = lesson.chunks(min(self.parts, len(lesson.rows)))
        shares = [len(part.rows) / len(lesson.rows) for part in parts]
        done = list(self.pool.map(self.part, parts, shares))
        for parameter, *gradients in zip(self.parameters, *(gradients for _, gradients in done), strict=True):
            parameter.grad = torch.stack(gradients).sum(0)
        return torch.stack([loss for loss, _ in done]).sum()

    def part(self, lesson: Lesson, share: float) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        loss = share * loss_of(self.model, lesson, self.guide)
        return loss.detach(), torch.autograd.grad(loss, self.parameters)


class AutocastGradients:
    """Gradients of a lesson's loss on a GPU, in bf16 where autocast allows it."""

    def __init__(
        self, model: torch.nn.ModuleDict, device: torch.device, guide: torch.nn.ModuleDict | None = None
    ) -> None:
        self.model, self.device, self.guide = model, device, guide

    def __call__(self, lesson: Lesson) -> torch.Tensor:
        """Set every parameter's ``grad``; returns the loss, without waiting for it."""
        here = Lesson(*(part.to(self.device, non_blocking=True) for part in lesson))
        self.model.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = loss_of(self.model, here, self.guide)
        loss.backward()
        return loss.detach()


def loss_of(
    model: torch.nn.ModuleDict, lesson: Lesson, guide: torch.nn.ModuleDict | None = None
) -> torch.Tensor:
    """The weighted squared error, a scalar, of the predicted pictures, to the lesson's or to a guide's."""
    alpha, sigma = alpha_sigma(lesson.timesteps)
    noisy = alpha * lesson.pictures + sigma * lesson.noise
    target = lesson.pictures
    if guide is not None:
        with torch.no_grad():
            target = predicted(guide, noisy, lesson)
    return (lesson.weights * (predicted(model, noisy, lesson) - target).square()).mean()


def predicted(model: torch.nn.ModuleDict, noisy: torch.Tensor, lesson: Lesson) -> torch.Tensor:
    """The pictures that a model sees in the noise."""
    context = model["words"](lesson.rows)
    words = {"num_tokens": context.shape[1]} if hasattr(model["unet"], "cap_embedder") else {}
    picture = model["unet"](noisy, lesson.timesteps.float(), context, transformer_options={}, **words)
    return picture.float()


class Run:
    """The training's folder: its state, the averaged weights, the log and the learning curve."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.state, self.weights = folder, folder / "state.pt", folder / "teacher.safetensors"
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, state: dict[str, object], ema: dict[str, torch.Tensor], notes: dict[str, str]) -> None:
        """Write ``state`` and the averaged weights; a kill leaves the old files or the new ones."""
        with replacing(self.state) as part:
            torch.save(state, part)
        half = {name: value.half().cpu().contiguous() for name, value in ema.items()}
        with replacing(self.weights) as part:
            save_file(half, part, {"title": "ΔConv demo teacher", "license": "Apache-2.0", **notes})

    def append(self, name: str, row: dict[str, object]) -> None:
        """Add ``row`` to a CSV file, with a heading when it is the first."""
        file = self.folder / name
        new = not file.exists()
        with file.open("a", newline="") as stream:
            writer = csv.DictWriter(stream, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)


def draws_right(weights: Path, count: int = 100, side: int = FULL, seed: int = 0) -> dict[str, float]:
    """How many words of ``count`` held-out prompts the detector finds in pictures by ``weights``."""
    unet = import_module(".nodes.host.demo.unet", comfy_host.import_pack().__name__)
    prompts = held_out_prompts(count, seed)
    size = Size(side, count, 20)
    settings = Settings((size,), cfg=3.0, seed=seed, batch=25, reference=0, teacher="", classifier="")
    model, words = unet.load_demo_model(str(weights)), unet.load_words(str(weights))
    return word_shares(words_right(sample(model, words, prompts, size, settings), prompts), prompts)


def make_model(seed: int, start_from: Path | None, kind: str = "unet") -> torch.nn.ModuleDict:
    """The demo's network of a ``kind`` and its word embedding, random or with the weights of a file."""
    demo_unet = import_module(".nodes.host.demo.unet", comfy_host.import_pack().__name__)
    torch.manual_seed(seed)
    config = demo_unet.CONFIGS[kind]()
    unet = config.get_model({}).diffusion_model.float().requires_grad_(True)
    initialize(unet)
    words = torch.nn.Embedding(len(VOCABULARY), demo_unet.CONTEXT_DIM)
    model = torch.nn.ModuleDict({"unet": unet, "words": words})
    if start_from:
        model.load_state_dict({name: value.float() for name, value in load_file(start_from).items()})
    return model


def compile_blocks(network: torch.nn.Module) -> None:
    """Compile the blocks of a NextDiT, at the first call, once for all blocks."""
    # Some sizes and numbers of pictures need programs of their own; PyTorch gives up after eight.
    torch._dynamo.config.recompile_limit = 64
    for blocks in (network.noise_refiner, network.layers):
        for block in blocks:
            block.compile(dynamic=True)


def train(
    model: torch.nn.ModuleDict,
    args: argparse.Namespace,
    stop: threading.Event,
    measure: Callable[[Path], dict[str, float]] = draws_right,
) -> None:
    """Train ``model`` to ``args.steps``, or until ``stop`` is set; resumes from the folder's saved state."""
    run, device, guide = Run(args.output), torch.device(args.device), None
    if args.guide:
        guide = make_model(0, args.guide).to(device).requires_grad_(False)
        model["words"] = guide["words"]  # one prompt node serves both
    model.to(device, memory_format=torch.channels_last if device.type != "cpu" else torch.preserve_format)
    own = model.state_dict()
    ema = {name: value.detach().clone() for name, value in own.items()}
    chosen = optimizers(model, args.lr)
    first, seen = 0, 0
    if run.state.exists():
        state = torch.load(run.state, device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, kept in zip(chosen, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        ema, first, seen = state["ema"], state["step"], state["pictures"]
    gradients: Gradients | AutocastGradients
    if device.type == "cpu":
        gradients = Gradients(model, args.threads, guide)
    else:
        gradients = AutocastGradients(model, device, guide)
    steps = range(first, args.steps)
    lessons = DataLoader(
        Lessons(args.batch_size, args.sizes, args.seed, other_shapes=OTHER_SHAPES if guide else 0.0),
        batch_size=None,
        sampler=steps,
        num_workers=args.workers,
        pin_memory=device.type != "cpu",
    )

    start, losses = time.perf_counter(), []
    bar = tqdm(lessons, initial=first, total=args.steps, mininterval=10)
    for step, lesson in zip(steps, bar, strict=True):
        losses.append(gradients(lesson))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        left = 1 - step / args.steps
        if args.minutes:
            left = min(left, 1 - (time.perf_counter() - start) / 60 / args.minutes)
        rate = learning_rate(step, max(left, 0.0), args.lr, args.decay)
        for optimizer in chosen:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        decay = min(args.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_([ema[name] for name in own], list(own.values()), 1 - decay)
        seen += len(lesson.rows)

        done = step + 1
        ended = done == args.steps or left <= 0
        last = ended or stop.is_set()
        measured = done % args.measure_every == 0 or ended
        if done % 20 == 0:
            mean, seconds = torch.stack(losses).mean().item(), time.perf_counter() - start
            row = {"step": done, "pictures": seen, "learning_rate": f"{rate:.2e}", "loss": f"{mean:.5f}"}
            run.append("log.csv", row | {"seconds": f"{seconds:.0f}"})
            bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
            losses.clear()
        if done % args.save_every == 0 or measured or last:
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in chosen],
                "ema": ema,
                "step": done,
                "pictures": seen,
            }
            run.save(state, ema, {"seed": str(args.seed), "steps": str(done), "pictures": str(seen)})
        if measured:
            shares = {name: f"{share:.3f}" for name, share in measure(run.weights).items()}
            point = {name: shares[name] for name in (*SLOTS, "mean", "all")}
            run.append("curve.csv", {"step": done, "pictures": seen, "learning_rate": f"{rate:.2e}", **point})
        if last:
            break


def size_shares(text: str) -> dict[int, float]:
    """``48:15,32:3`` of a command line: sides of pictures, and their shares of the steps."""
    return {int(side): float(share) for side, _, share in (part.partition(":") for part in text.split(","))}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    sizes = "48:75,32:15,64:5,96:5"
    add("--output", type=Path, required=True, help="folder for weights, logs and saved state")
    add("--model", choices=("unet", "joint"), default="unet", help="the network (default unet)")
    add(
        "--guide",
        type=Path,
        help="a U-Net's safetensors file: its predictions are the targets, its words stay",
    )
    add("--compile", action="store_true", help="compile the transformer blocks of --model joint")
    add(
        "--start-from", type=Path, help="a teacher's safetensors file to start from (default: random weights)"
    )
    add("--steps", type=int, default=20000, help="all steps (default 20000)")
    add("--minutes", type=float, help="end after this time at the latest, which the rate then falls to")
    add("--decay", type=float, default=0.2, help="last part of it with a falling rate (default 0.2)")
    add("--batch-size", type=int, default=32, help="pictures of 48x48 a step (default 32)")
    add("--sizes", type=size_shares, default=sizes, help=f"sides and their shares of the steps ({sizes})")
    add("--lr", type=float, default=1.5e-3, help="peak learning rate (default 1.5e-3)")
    add("--ema", type=float, default=0.998, help="decay of the averaged weights (default 0.998)")
    add("--seed", type=int, default=0, help="seed of weights, pictures and noise (default 0)")
    add_device(parser)
    add("--threads", type=int, default=os.cpu_count(), help="of a CPU (default: one for each core)")
    add("--workers", type=int, help="processes that draw (default: none on a CPU, else one for each core)")
    add("--save-every", type=int, default=100, help="steps between saved states (default 100)")
    add("--measure-every", type=int, default=800, help="steps between points of the curve (default 800)")
    args = parser.parse_args(arguments)
    if args.workers is None:
        args.workers = 0 if args.device == "cpu" else os.cpu_count()
    return args


def main() -> None:
    args, stop = parse(), threading.Event()
    torch.set_num_threads(1)  # here; the threads of `Gradients` share out the pictures
    torch.set_float32_matmul_precision("high")
    use_device(args.device)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    model = make_model(args.seed, args.start_from, args.model)
    # The rotary embeddings of newer versions of ComfyUI have no gradients otherwise.
    import_module("comfy.model_management").in_training = True
    if args.compile:
        compile_blocks(model["unet"])
    train(model, args, stop)


if __name__ == "__main__":
    main()
