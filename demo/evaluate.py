"""How often teacher and student draw what held-out prompts ask for: ``python -m demo.evaluate``.

Samples prompts that training never saw through ComfyUI's own KSampler code, with the same seeds for both
modes, and reads every picture with the detector. Prints a table, and writes it with every single reading as
JSON.
"""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from deltaconv_core import load_checkpoint
from scripts.comfy_host import import_pack

from .detector import read_picture
from .files import student_file, teacher_file
from .pictures import draw, every_prompt, is_held_out, random_scene
from .words import SLOTS, Prompt, token_rows


def held_out_prompts(count: int, seed: int) -> list[Prompt]:
    """``count`` prompts that training never saw, drawn without repetition."""
    prompts = [prompt for prompt in every_prompt() if is_held_out(prompt)]
    return [prompts[i] for i in np.random.default_rng(seed).permutation(len(prompts))[:count]]


def sample(
    model: Any,
    words: torch.Tensor,
    prompts: list[Prompt],
    size: int,
    seed: int,
    steps: int,
    cfg: float,
    batch: int,
) -> np.ndarray:
    """One picture per prompt as uint8 (N, size, size, 3), by ComfyUI's sampler "euler" on its "normal"
    schedule."""
    import comfy.sample

    negative = [[words[torch.tensor(token_rows(Prompt()))].unsqueeze(0), {}]]
    pictures = []
    for first in tqdm(range(0, len(prompts), batch)):
        some = prompts[first : first + batch]
        positive = [[words[torch.tensor([token_rows(prompt) for prompt in some])], {}]]
        noise = torch.randn(len(some), 3, size, size, generator=torch.manual_seed(seed + first))
        latent = comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            "euler",
            "normal",
            positive,
            negative,
            torch.zeros_like(noise),
            disable_pbar=True,
        )
        pictures.append(((latent.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(pictures)


def score(pictures: np.ndarray, prompts: list[Prompt]) -> dict[str, float]:
    """Share of pictures that fulfil each slot of their prompt, all of them, and the mirror's symmetry."""
    matches = []
    for picture, prompt in zip(pictures, prompts, strict=True):
        reading = read_picture(picture)
        if prompt.layout == "mirror" and prompt.position == "right":
            prompt = prompt._replace(position="left")  # the same picture
        matches.append(reading.matches(prompt))
    table = {slot: float(np.mean([match[slot] for match in matches])) for slot in SLOTS}
    mirrored = [
        match["layout"] for match, prompt in zip(matches, prompts, strict=True) if prompt.layout == "mirror"
    ]
    table["symmetry"] = float(np.mean(mirrored)) if mirrored else float("nan")
    table["all"] = float(np.mean([all(match.values()) for match in matches]))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", type=Path, default=teacher_file(), help="the teacher's safetensors file")
    parser.add_argument("--student", type=Path, default=student_file(), help="ΔConv weights of the student")
    parser.add_argument(
        "--prompts", type=int, default=200, help="held-out prompts (default 200, at most 613)"
    )
    parser.add_argument("--size", type=int, default=48, help="side of the pictures in pixels (default 48)")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps (default 20)")
    parser.add_argument("--cfg", type=float, default=3.0, help="classifier-free guidance scale (default 3.0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of prompts and noise (default 0)")
    parser.add_argument("--batch", type=int, default=40, help="pictures sampled at once (default 40)")
    parser.add_argument("--output", type=Path, help="folder for the table as JSON and a sheet of pictures")
    args = parser.parse_args()

    pack = import_pack()
    demo_unet = import_module(".nodes.host.demo_unet", pack.__name__)
    apply = import_module(".nodes.host.apply", pack.__name__)
    switch = import_module(".deltaconv_core.switch", pack.__name__)
    teacher = demo_unet.load_demo_model(str(args.teacher))
    words = demo_unet.load_words(str(args.teacher))
    models = {"attention": teacher}
    if args.student.exists():
        settings = apply.Settings("all", switch.SamplingRange(), None)
        models["ΔConv"], _ = apply.apply_checkpoint(teacher, load_checkpoint(args.student), settings)

    prompts = held_out_prompts(args.prompts, args.seed)
    rng = np.random.default_rng(args.seed)
    pictures = {"drawn": np.stack([draw(random_scene(prompt, rng), args.size) for prompt in prompts])}
    for name, model in models.items():
        pictures[name] = sample(model, words, prompts, args.size, args.seed, args.steps, args.cfg, args.batch)
    tables = {name: score(some, prompts) for name, some in pictures.items()}
    if "ΔConv" in pictures:
        error = (pictures["ΔConv"].astype(float) - pictures["attention"]) / 255
        psnr = -10 * np.log10((error**2).mean(axis=(1, 2, 3)))
        tables["ΔConv"]["psnr_to_attention_db"] = float(psnr.mean())

    columns = [*SLOTS, "symmetry", "all"]
    print(
        f"{len(prompts)} held-out prompts, {args.size}x{args.size}, {args.steps} steps, "
        f"cfg {args.cfg}, seed {args.seed}"
    )
    print("| model | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, table in tables.items():
        print(f"| {name} | " + " | ".join(f"{table[column]:.3f}" for column in columns) + " |")
    if args.output:
        write_results(args.output, vars(args), tables, pictures)


def write_results(
    folder: Path, settings: dict, tables: dict, pictures: dict[str, np.ndarray], shown: int = 16
) -> None:
    """The table as JSON, and a sheet with one row per model."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in settings.items() if isinstance(value, (int, float))}
    (folder / "evaluation.json").write_text(
        json.dumps({"settings": kept, "tables": tables}, indent=1, ensure_ascii=False)
    )
    rows = [np.concatenate(list(some[:shown]), axis=1) for some in pictures.values()]
    sheet = Image.fromarray(np.concatenate(rows))
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(folder / "sheet.png")


if __name__ == "__main__":
    main()
