"""Distil the demo teacher's self-attention: ``python -m demo.study.train_student --output runs/student``.

First layer-wise: the teacher runs, and every mixer learns its own attention's output from its input. Then
end to end with the paper's loss, through the frozen network. A run that was stopped resumes from its last
saved state. Options leave parts of ΔConv out, or take linear attention instead, to see what each part does.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from deltaconv_core import BlockSpec, Checkpoint, DeltaConvBlock, save_checkpoint
from deltaconv_core.distill import Batch, Row, RunFolder, Settings, distill, random_start, warm_start
from deltaconv_core.distill.hybrid import FitSettings
from deltaconv_core.distill.losses import BETA
from scripts.comfy_host import import_pack

from ..files import teacher_file
from .device import add_device, use_device
from .diffusion import FULL, SMALL, DrawnBatches, alpha_sigma
from .ridge_start import ridge_start
from .students import linear_mixers, save_linear


@dataclass
class DemoNetwork:
    """The demo model as `deltaconv_core.distill.Network`; its batches' inputs are (timesteps, words)."""

    unet: torch.nn.Module
    attentions: dict[str, torch.nn.Module]
    grids: dict[str, Any]
    streams: dict[str, torch.nn.Module]
    segments: tuple[torch.nn.Module, ...] = ()
    prediction: str = "epsilon"

    def __call__(self, batch: Batch) -> torch.Tensor:
        """The noise in the latents, from the clean picture that the network predicts."""
        timesteps, context = batch.inputs
        alpha, sigma = alpha_sigma(timesteps)
        picture = self.unet(batch.noisy, timesteps.float(), context=context, transformer_options={})
        return (batch.noisy - alpha * picture) / sigma


class Teacher:
    """The demo model, opened for distillation."""

    def __init__(self, path: Path) -> None:
        self.pack = import_pack().__name__
        demo_unet = import_module(".nodes.host.demo.unet", self.pack)
        self.model = demo_unet.load_demo_model(str(path))
        self.words = demo_unet.load_words(str(path)).to(self.model.load_device)
        self.found = import_module(".nodes.host.model.sites", self.pack).find_sites(self.model)
        self.sites, self.architecture = self.found.sites, self.found.architecture
        self.block_specs = import_module(".deltaconv_core.sites.choose_specs", self.pack).block_specs
        self.device = self.model.load_device
        whole = self.model.model.requires_grad_(False).eval().to(self.device)
        modules = {id: whole.get_submodule(site.path) for id, site in self.sites.items()}
        after = {
            id: whole.get_submodule(site.path.removesuffix("attn1") + "norm2")
            for id, site in self.sites.items()
        }
        grids = {id: site.grid_of for id, site in self.sites.items()}
        self.network = DemoNetwork(whole.diffusion_model, modules, grids, after)

    def batches(self, batch_size: int, seed: int) -> Any:
        """Noisy pictures by number, most of them of the full size."""
        draw = DrawnBatches(batch_size, seed)

        def batch(number: int) -> Batch:
            drawn = draw(number, SMALL if number % 5 == 0 else FULL)
            x0, rows, timesteps, noise = (part.to(self.device) for part in drawn)
            alpha, sigma = alpha_sigma(timesteps)
            snr = (alpha / sigma).square().flatten()
            return Batch(alpha * x0 + sigma * noise, noise, snr, (timesteps, self.words[rows]))

        return batch


def make_blocks(
    teacher: Teacher,
    seed: int,
    start: str = "warm",
    form: str = "lean",
    kernel_sizes: str = "auto",
    stages: int = 2,
    global_branch: bool = True,
) -> dict[str, DeltaConvBlock]:
    """The ΔConvBlocks; `kernel_sizes` and `form` as the node ΔConv Distill takes them."""
    torch.manual_seed(seed)
    blocks = {}
    for id, told in teacher.block_specs(teacher.found.shape, teacher.sites, kernel_sizes, form).items():
        spec = BlockSpec.from_dict(told.to_dict())  # the pack's own class is another one
        block = DeltaConvBlock(replace(spec, scales=spec.scales[:stages])).to(teacher.device)
        if start == "random":
            random_start(block)
        else:
            warm_start(block, teacher.network.attentions[id])
        if not global_branch:
            for parameter in block.conv_pool.parameters():
                torch.nn.init.zeros_(parameter).requires_grad_(False)
        blocks[id] = block
    if start == "ridge":
        ridge_start(teacher, blocks)
    return blocks


def fitted_hybrids(teacher: Teacher, shape: str, batches: int) -> dict[str, Any]:
    """Hybrid mixers of a shape of `hybrids.SHAPES`, fitted to this many batches of noisy drawings."""
    from .hybrids import FIT_BATCH, FIT_SEED, SHAPES, Between, fit_shapes

    drawings = teacher.batches(FIT_BATCH, FIT_SEED)
    fitted = fit_shapes(teacher, {shape: SHAPES[shape]}, drawings, batches, FitSettings())[shape]
    return {
        site: Between(teacher, site, one.mixer.to(teacher.device).requires_grad_(True))
        for site, one in fitted.items()
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--teacher", type=Path, default=teacher_file(), help="the teacher's safetensors file")
    add("--output", type=Path, required=True, help="folder for weights, log and saved state")
    add("--mixer", choices=("deltaconv", "linear", "hybrid"), default="deltaconv", help="default ΔConv")
    add("--shape", default="Nyström 144", help="of hybrids, which are fitted first (default Nyström 144)")
    add("--fit-batches", type=int, default=24, help="of 8 drawings, to fit hybrids to (default 24)")
    add("--form", choices=("lean", "released"), default="lean", help="of the blocks (default lean)")
    add("--kernel-sizes", default="auto", help="auto, one odd number, or JSON (default auto)")
    add("--start", choices=("warm", "random", "ridge"), default="warm", help="ΔConv's (default warm)")
    add("--no-global", action="store_true", help="ΔConv without its average-pooling branch")
    add("--no-pyramid", action="store_true", help="ΔConv with the full-size stage only")
    add("--layer-steps", type=int, default=400, help="layer-wise steps (default 400)")
    add("--output-steps", type=int, default=600, help="end-to-end steps after those (default 600)")
    add("--batch-size", type=int, default=16, help="pictures per step (default 16)")
    add("--lr", type=float, default=2e-3, help="peak learning rate of AdamW (default 2e-3)")
    add("--decay", type=float, default=0.5, help="part of a phase in which the rate falls (default 0.5)")
    add("--beta", type=float, default=BETA, help=f"weight of the feature loss end to end (default {BETA})")
    add("--seed", type=int, default=1, help="seed of blocks, pictures and noise (default 1)")
    add_device(parser)
    return parser.parse_args()


def main() -> None:
    args = parse()
    use_device(args.device)
    teacher = Teacher(args.teacher)
    if args.mixer == "linear":
        mixers: dict[str, Any] = linear_mixers(teacher.sites, teacher.model.model)
        for mixer in mixers.values():
            mixer.to(teacher.device).requires_grad_(True)
    elif args.mixer == "hybrid":
        mixers = fitted_hybrids(teacher, args.shape, args.fit_batches)
    else:
        mixers = make_blocks(
            teacher,
            args.seed,
            args.start,
            args.form,
            args.kernel_sizes,
            2 - args.no_pyramid,
            not args.no_global,
        )
    steps = args.layer_steps + args.output_steps
    if steps:
        settings = Settings(
            layer_steps=args.layer_steps,
            output_steps=args.output_steps,
            learning_rate=args.lr,
            decay=args.decay,
            beta=args.beta,
            checkpointing=False,
            seed=args.seed,
        )
        notes = {name: str(getattr(args, name)) for name in ("mixer", "start", "batch_size")}
        notes |= {"shape": args.shape} if args.mixer == "hybrid" else {}
        folder = RunFolder(args.output)
        with tqdm(total=steps, mininterval=10) as bar:

            def show(row: Row) -> None:
                bar.update(row.step - bar.n)
                bar.set_postfix(
                    phase=row.phase, **{k: f"{v:.5f}" for k, v in row.losses.items()}, refresh=False
                )

            batches = teacher.batches(args.batch_size, args.seed)
            distill(teacher.network, mixers, batches, settings, folder, show, notes)
    metadata = {
        "title": "ΔConv demo student",
        "teacher": "demo/weights/teacher.safetensors",
        "license": "Apache-2.0",
        "training": f"{args.layer_steps} layer-wise and {args.output_steps} end-to-end steps of "
        f"{args.batch_size} pictures, seed {args.seed}, AdamW {args.lr}",
    }
    own = {id: mixer.mixer if args.mixer == "hybrid" else mixer for id, mixer in mixers.items()}
    half = {id: mixer.cpu().half() for id, mixer in own.items()}
    args.output.mkdir(parents=True, exist_ok=True)
    if args.mixer == "linear":
        save_linear(half, args.output / "linear.safetensors", metadata)
    else:
        save_checkpoint(
            Checkpoint(teacher.architecture, half, metadata=metadata), args.output / "deltaconv.safetensors"
        )


if __name__ == "__main__":
    main()
