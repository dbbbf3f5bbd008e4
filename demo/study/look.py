"""How local the demo teacher's self-attention is: ``python -m demo.study.look --output runs/look``.

What the node ΔConv Attention Locality shows: figure, table, and the recommendation, whose JSON
``python -m demo.study.train_student --kernel-sizes`` takes.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

import torch

from deltaconv_core.locality import recommend
from deltaconv_core.locality.figure import save
from deltaconv_core.locality.table import text, write_csv

from ..files import teacher_file
from ..words import token_rows
from .device import add_device, use_device
from .diffusion import FULL
from .metrics import held_out_prompts
from .train_student import Teacher


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", type=Path, default=teacher_file(), help="the teacher's safetensors file")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for figure, table and recommendation"
    )
    parser.add_argument("--max-kernel-size", type=int, default=13, help="largest K to recommend (default 13)")
    add_device(parser)
    args = parser.parse_args()
    use_device(args.device)
    teacher = Teacher(args.teacher)
    look = import_module(".nodes.host.locality.look", teacher.pack)
    prompt = held_out_prompts(2, seed=0)[0]
    positive = [[teacher.words[token_rows(prompt)].cpu().unsqueeze(0), {}]]
    latent = {"samples": torch.zeros(1, 3, FULL, FULL)}
    seen = look.look(
        teacher.model, positive, latent, look.LookSettings(steps=20, looks=4, blocks="all", seed=0)
    )
    advice = recommend(seen.layers, seen.architecture, args.max_kernel_size)
    args.output.mkdir(parents=True, exist_ok=True)
    save(args.output / "locality.png", seen.layers, advice, f"Self-attention of {seen.architecture}")
    write_csv(seen.layers, advice, args.output)
    (args.output / "recommendation.json").write_text(advice.to_json(), encoding="utf-8")
    print(text(seen.layers, advice))


if __name__ == "__main__":
    main()
