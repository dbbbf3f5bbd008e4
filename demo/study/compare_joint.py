"""What can stand in for joint attention, at equal cost: ``python -m demo.study.compare_joint``.

    python -m demo.study.compare_joint --output FOLDER

Takes the demo's NextDiT and puts in place of every attention that the image takes part in, the text staying
exact: joint mixers of a window and landmarks in one softmax, fitted without training ("hybrid"), the same
trained for some steps ("hybrid, trained"), landmarks with kernels instead of the window ("kernels"),
landmarks alone, more of them ("pooled"), and a larger window alone ("window"); all at about the same
multiply-adds. Samples held-out prompts with each, with the same noise, and measures what
`demo.study.evaluate` measures. Everything is kept in the folder: a call that was stopped continues.
"""

from __future__ import annotations

import argparse
import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deltaconv_core import DeltaConvError, load_checkpoint, save_checkpoint

from ..files import classifier_file, joint_file
from . import tables
from .classifier import load_classifier
from .device import add_device, use_device
from .evaluate import DRAWN, TEACHER, Folder, Settings, Size, count_gflop, sample, sha256
from .joint_students import (
    MIXERS,
    Stands,
    Teacher,
    checkpoint,
    fit,
    gflop,
    put,
    train,
    window_attention,
)
from .lessons import Lessons
from .metrics import drawings, held_out_prompts, measure, reference_moments
from .train_teacher import size_shares

FIT_SEED, TRAIN_SEED = 2000, 3000
TRAINED = "hybrid, trained"
FUNCTIONS = {"window": window_attention}
"""Without parameters."""


def parse(arguments: list[str] | None = None) -> Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--teacher",
        type=Path,
        default=joint_file(),
        help="the teacher's safetensors file (default: the demo's)",
    )
    add("--output", type=Path, required=True, help="folder for weights, pictures and tables")
    add("--fit-batches", type=int, default=40, help="batches of noisy drawings to fit on (default 40)")
    add("--train-steps", type=int, default=300, help="of the trained hybrid (default 300)")
    add("--lr", type=float, default=3e-3, help="of its training, at the beginning (default 0.003)")
    add("--batch-size", type=int, default=8, help="drawings of 48x48 in a batch (default 8)")
    add("--sizes", type=size_shares, default="48:1", help="their sides, and shares of those (48:1)")
    add("--prompts", type=int, default=200, help="held-out prompts sampled (default 200)")
    add("--prompts-large", type=int, default=100, help="of them at twice the size; 0: none (default 100)")
    add("--steps", type=int, default=20, help="sampling steps (default 20)")
    add("--reference", type=int, default=4000, help="drawings for the Fréchet distance (default 4000)")
    add("--batch", type=int, default=40, help="pictures sampled at once (default 40)")
    add_device(parser)
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    use_device(args.device)
    try:
        run(args)
    except DeltaConvError as error:
        raise SystemExit(f"error: {error}") from error


def run(args: Namespace) -> None:
    """Fit, train, sample and measure; what is in the folder already is not done again."""
    known = sha256(args.teacher)
    teacher, folder = Teacher(args.teacher), args.output
    files = weights(teacher, known, args)
    stands: dict[str, Mapping[str, Any]] = {name: mixers_of(file, teacher) for name, file in files.items()}
    for name, function in FUNCTIONS.items():
        stands[name] = dict.fromkeys(teacher.sites, function)
    hashes = {DRAWN: "", TEACHER: known, **dict.fromkeys(FUNCTIONS, known)}
    hashes |= {name: sha256(file) for name, file in files.items()}
    sizes = [Size(48, args.prompts, args.steps)]
    if args.prompts_large:
        sizes.append(Size(96, args.prompts_large, args.steps))
    settings = Settings(
        tuple(sizes), 3.0, 0, args.batch, args.reference, known, classifier=sha256(classifier_file())
    )
    report(teacher, stands, hashes, Folder(folder, settings))


def weights(teacher: Teacher, known: str, args: Namespace) -> dict[str, Path]:
    """Name -> file of joint mixers; those that are missing are fitted, or trained."""
    args.output.mkdir(parents=True, exist_ok=True)
    key = {name: getattr(args, name) for name in ("fit_batches", "batch_size", "sizes")} | {"teacher": known}
    files = {name: args.output / f"{name}.safetensors" for name in (*MIXERS, TRAINED)}
    told = {name: json.dumps(key | {"shape": shape}) for name, shape in MIXERS.items()}
    more = {"shape": MIXERS["hybrid"], "train_steps": args.train_steps, "lr": args.lr}
    told[TRAINED] = json.dumps(key | more)

    def missing(name: str) -> bool:
        return not files[name].exists() or load_checkpoint(files[name]).metadata.get("made") != told[name]

    if any(missing(name) for name in MIXERS):
        fitted = fit(teacher, Lessons(args.batch_size, args.sizes, FIT_SEED), args.fit_batches)
        for name, sites in fitted.items():
            errors = {site: round(one.error, 4) for site, one in sites.items()}
            print(f"{name}: relative errors of the layers {errors}")
            mixers = {site: one.mixer for site, one in sites.items()}
            texts = {"made": told[name], "errors": json.dumps(errors)}
            save_checkpoint(checkpoint(teacher, mixers, texts), files[name])  # type: ignore[arg-type]
    if missing(TRAINED):
        mixers = mixers_of(files["hybrid"], teacher)
        lessons = Lessons(args.batch_size, args.sizes, TRAIN_SEED)
        losses = train(teacher, mixers, lessons, args.train_steps, args.lr)
        parts = [np.mean(part) for part in np.array_split(losses, min(6, len(losses)))] if losses else []
        print("trained, losses: " + ", ".join(f"{loss:.5f}" for loss in parts))
        save_checkpoint(checkpoint(teacher, mixers, {"made": told[TRAINED]}), files[TRAINED])
    return files


def mixers_of(file: Path, teacher: Teacher) -> dict[str, Any]:
    """Site -> joint mixer, on the teacher's device."""
    blocks = load_checkpoint(file).blocks
    return {site: mixer.float().to(teacher.device) for site, mixer in blocks.items()}


def report(
    teacher: Teacher, stands: Mapping[str, Mapping[str, Stands]], hashes: Mapping[str, str], folder: Folder
) -> None:
    """Sample with each, measure, and write and print the tables."""
    settings, classifier = folder.settings, load_classifier(classifier_file())
    measured: dict[str, dict[str, Any]] = {name: {} for name in hashes}
    for size in settings.sizes:
        prompts = held_out_prompts(size.prompts, settings.seed)
        reference = reference_moments(classifier, prompts, size.side, settings.reference, settings.seed)
        whole = count_gflop(teacher.model, teacher.words, prompts, size)
        theirs = None
        for name, known in hashes.items():

            def make(name: str = name, size: Size = size, prompts: list[Any] = prompts) -> np.ndarray:
                if name == DRAWN:
                    return drawings(prompts, size.side, np.random.default_rng(settings.seed))
                print(f"{name}: {size.prompts} pictures of {size.side}x{size.side}", flush=True)
                model = teacher.model if name == TEACHER else put(teacher, stands[name])
                return sample(model, teacher.words.cpu(), prompts, size, settings)

            pictures = folder.pictures(name, size, known, make)
            found = measure(pictures, prompts, classifier, reference, theirs)
            theirs = pictures if name == TEACHER else theirs
            if name != DRAWN:
                grid = teacher.grid(size.side, size.side)
                found["gflop"] = gflop(teacher, stands.get(name, {}), grid, whole)
            measured[name][str(size.side)] = found
    for name, table in measured.items():
        folder.keep(name, {"sha256": hashes[name], "sizes": table})
    tables.write_report(folder.path, folder.results(list(hashes)))


if __name__ == "__main__":
    main()
