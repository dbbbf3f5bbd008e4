"""How well students of the demo model draw, beside their teacher: ``python -m demo.study.evaluate``.

    python -m demo.study.evaluate --output FOLDER --student NAME=FILE --student NAME=FILE ...

Samples prompts that training never saw through ComfyUI's own KSampler code, with the same noise for every
model, at the training size and at twice it, and measures the pictures: how often the detector finds each
word, the Fréchet distance to drawings of the same prompts, the PSNR to the teacher's pictures. The folder
keeps pictures and results, so that students can be measured one by one: a later call samples only what is
missing, and its table holds everything that was measured there with the same settings.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from deltaconv_core import DeltaConvError
from deltaconv_core.util.whole_file import replacing

from ..files import classifier_file, named_file, student_file, teacher_file
from ..words import Prompt, token_rows
from . import tables
from .classifier import load_classifier
from .device import add_device, use_device
from .metrics import drawings, held_out_prompts, measure, reference_moments
from .students import count_weights, put_student

DRAWN, TEACHER = "drawn", "attention"


class Size(NamedTuple):
    """What is sampled at one size."""

    side: int
    prompts: int
    steps: int


@dataclass(frozen=True)
class Settings:
    """Everything that the figures depend on beside the models; models are compared at equal settings."""

    sizes: tuple[Size, ...]
    cfg: float
    seed: int
    batch: int
    reference: int
    teacher: str  # sha256 of the file
    classifier: str  # likewise


class Models:
    """The MODELs, loaded when something has to be sampled."""

    def __init__(self, teacher: Path, students: dict[str, Path]) -> None:
        self.file = teacher
        self.students = students

    @cached_property
    def pack(self) -> str:
        from scripts.comfy_host import import_pack

        return import_pack().__name__

    @cached_property
    def teacher(self) -> Any:
        return import_module(".nodes.host.demo.unet", self.pack).load_demo_model(str(self.file))

    @cached_property
    def words(self) -> torch.Tensor:
        return import_module(".nodes.host.demo.unet", self.pack).load_words(str(self.file))

    def __getitem__(self, name: str) -> Any:
        if name == TEACHER:
            return self.teacher
        return put_student(self.teacher, self.students[name], self.pack)


def sample(
    model: Any, words: torch.Tensor, prompts: list[Prompt], size: Size, settings: Settings
) -> np.ndarray:
    """One picture per prompt as uint8 (N, side, side, 3), by ComfyUI's sampler "euler" on its "normal"
    schedule."""
    import comfy.sample

    negative = [[words[torch.tensor(token_rows(Prompt()))].unsqueeze(0), {}]]
    pictures = []
    for first in tqdm(range(0, len(prompts), settings.batch)):
        some = prompts[first : first + settings.batch]
        positive = [[words[torch.tensor([token_rows(prompt) for prompt in some])], {}]]
        generator = torch.manual_seed(settings.seed + first)
        noise = torch.randn(len(some), 3, size.side, size.side, generator=generator)
        latent = comfy.sample.sample(
            model,
            noise,
            size.steps,
            settings.cfg,
            "euler",
            "normal",
            positive,
            negative,
            torch.zeros_like(noise),
            disable_pbar=True,
        )
        pictures.append(((latent.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(pictures)


def count_gflop(model: Any, words: torch.Tensor, prompts: list[Prompt], size: Size) -> float:
    """Floating point operations of the whole network for one picture and pass, in units of 1e9.

    Counted by PyTorch: two for each multiply-add of convolutions and matrix products, nothing else.
    """
    passes = 2  # with guidance
    once = Settings((), 3.0, seed=0, batch=1, reference=0, teacher="", classifier="")
    # PyTorch does not count its fused attention on a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sample(model, words, prompts[:1], size._replace(steps=1), once)
    return counter.get_total_flops() / passes / 1e9


class Folder:
    """Pictures and results of every model measured so far."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path, self.settings = path, settings
        for part in ("models", "pictures"):
            (path / part).mkdir(parents=True, exist_ok=True)

    def pictures(self, name: str, size: Size, model_hash: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The kept pictures if they were made the same way from the same weights, else ``make()``."""
        file = self.path / "pictures" / f"{name}-{size.side}.npz"
        kept = asdict(self.settings) | {"sizes": size, "model": model_hash}
        for later in ("reference", "classifier"):
            del kept[later]
        key = json.dumps(kept)
        if file.exists():
            with np.load(file) as stored:
                if str(stored["key"]) == key:
                    return stored["pictures"]
        pictures = make()
        with replacing(file) as part, part.open("wb") as opened:  # numpy would add a suffix to a path
            np.savez_compressed(opened, pictures=pictures, key=key)
        return pictures

    def keep(self, name: str, result: dict[str, Any]) -> None:
        tables.write_json(self.path / "models" / f"{name}.json", self._described() | result)

    def results(self, first: list[str]) -> dict[str, dict[str, Any]]:
        """Results at these settings by model: those named ``first``, then others by name."""
        found = {file.stem: json.loads(file.read_text()) for file in (self.path / "models").glob("*.json")}
        wanted = self._described()["settings"]
        same = {name: result for name, result in found.items() if result["settings"] == wanted}
        for name in sorted(found.keys() - same.keys()):
            print(f"{name} is left out: it was measured with other settings.")
        return {name: same[name] for name in [*first, *sorted(same.keys() - set(first))]}

    def _described(self) -> dict[str, Any]:
        return {"settings": json.loads(json.dumps(asdict(self.settings)))}


def sha256(path: Path) -> str:
    """Of the file; ``DeltaConvError`` when there is none."""
    if not path.is_file():
        raise DeltaConvError(f"there is no file {path}")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", type=Path, default=teacher_file(), help="the teacher's safetensors file")
    parser.add_argument(
        "--student",
        type=named_file,
        action="append",
        metavar="NAME=FILE",
        help="ΔConv weights or linear attention; may be given often (default: the shipped ΔConv)",
    )
    parser.add_argument(
        "--prompts", type=int, default=200, help="held-out prompts (default 200, at most 613)"
    )
    parser.add_argument(
        "--prompts-large", type=int, default=100, help="of them at twice the size; 0: none (default 100)"
    )
    parser.add_argument("--size", type=int, default=48, help="side of the pictures in pixels (default 48)")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps (default 20)")
    parser.add_argument("--steps-large", type=int, help="those at twice the size (default: as many)")
    parser.add_argument("--cfg", type=float, default=3.0, help="classifier-free guidance scale (default 3.0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of prompts and noise (default 0)")
    parser.add_argument("--batch", type=int, default=40, help="pictures sampled at once (default 40)")
    parser.add_argument(
        "--reference", type=int, default=4000, help="drawings for the Fréchet distance (default 4000)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("output/evaluation"), help="folder (default output/evaluation)"
    )
    add_device(parser)
    args = parser.parse_args()
    args.student = args.student or [("ΔConv", student_file())]
    taken = [name for name, _ in args.student]
    if len({*taken, DRAWN, TEACHER}) != len(taken) + 2:
        parser.error(f"names of students must differ, and not be {DRAWN} or {TEACHER}: {', '.join(taken)}")
    return args


def main() -> None:
    args = parse_arguments()
    use_device(args.device)
    try:
        run(args)
    except DeltaConvError as error:
        raise SystemExit(f"error: {error}") from error


def run(args: argparse.Namespace) -> None:
    students = dict(args.student)
    files = {TEACHER: args.teacher, **students}
    hashes = {DRAWN: ""} | {name: sha256(file) for name, file in files.items()}
    sizes = [Size(args.size, args.prompts, args.steps)]
    if args.prompts_large:
        sizes.append(Size(2 * args.size, args.prompts_large, args.steps_large or args.steps))
    settings = Settings(
        sizes=tuple(sizes),
        cfg=args.cfg,
        seed=args.seed,
        batch=args.batch,
        reference=args.reference,
        teacher=hashes[TEACHER],
        classifier=sha256(classifier_file()),
    )
    weights = {name: count_weights(file) for name, file in students.items()}
    chosen = [(size, held_out_prompts(size.prompts, args.seed)) for size in sizes]
    folder, models = Folder(args.output, settings), Models(args.teacher, students)
    classifier = load_classifier(classifier_file())

    measured: dict[str, dict[str, Any]] = {name: {} for name in hashes}
    for size, prompts in chosen:
        reference = reference_moments(classifier, prompts, size.side, args.reference, args.seed)
        teacher = None
        for name, model_hash in hashes.items():

            def make(name: str = name, size: Size = size, prompts: list[Prompt] = prompts) -> np.ndarray:
                if name == DRAWN:
                    return drawings(prompts, size.side, np.random.default_rng(args.seed))
                print(f"{name}: {size.prompts} pictures of {size.side}x{size.side}")
                return sample(models[name], models.words, prompts, size, settings)

            pictures = folder.pictures(name, size, model_hash, make)
            measured[name][str(size.side)] = measure(pictures, prompts, classifier, reference, teacher)
            teacher = pictures if name == TEACHER else teacher
            if name != DRAWN:
                gflop = count_gflop(models[name], models.words, prompts, size)
                measured[name][str(size.side)]["gflop"] = gflop
    for name, table in measured.items():
        counted = {"weights": weights[name]} if name in weights else {}
        folder.keep(name, {"sha256": hashes[name], **counted, "sizes": table})
    tables.write_report(args.output, folder.results(list(hashes)))


if __name__ == "__main__":
    main()
