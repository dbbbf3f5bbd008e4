"""Hybrid mixers of many shapes beside each other, without training: ``python -m demo.study.compare_hybrids``.

    python -m demo.study.compare_hybrids --output FOLDER [--student NAME=FILE ...]

Fits every shape to every self-attention of the demo teacher in one pass over noisy drawings, puts it in the
place of all of them, and prints for each, and for students that are named:

- the relative error of its layers on drawings held out of the fit, averaged over the layers;
- the paper's feature loss and output loss on other drawings;
- multiply-adds and time of the whole network at the training size;
- what `demo.study.evaluate` measures on sampled pictures: PSNR to the teacher's, words, Fréchet distance, at
  the training size and at twice it.

A shape is within the noise of the best when its PSNR is within two standard errors. Everything is kept in the
folder: a call that was stopped continues, and one with more shapes measures only those.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from deltaconv_core import DeltaConvError, bench, load_checkpoint, save_checkpoint
from deltaconv_core.distill import EndToEnd, tapped
from deltaconv_core.distill import Settings as Distillation
from deltaconv_core.distill.hybrid import FitSettings
from deltaconv_core.mixers.hybrid import HybridMixer

from ..files import named_file, teacher_file
from . import evaluate
from .compare_starts import HELD_OUT_SEED
from .device import add_device, use_device
from .hybrids import FIT_BATCH, FIT_SEED, SHAPES, Between, checkpoint_of, fit_shapes
from .students import is_linear, load_linear
from .tables import write_json
from .train_student import Teacher

NOISE = 2.0  # standard errors


def parse(arguments: list[str] | None = None) -> Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for fits, weights, pictures and the table")
    add("--teacher", type=Path, default=teacher_file(), help="the teacher's safetensors file")
    add("--shapes", nargs="+", metavar="SHAPE", default=list(SHAPES), help="those to fit (default all)")
    add("--list", action="store_true", help="print the names of all shapes and end")
    add(
        "--student", type=named_file, action="append", default=[], metavar="NAME=FILE",
        help="ΔConv weights or linear attention to measure beside them; may be given often",
    )  # fmt: skip
    add("--fit-batches", type=int, default=40, help="batches of noisy drawings to fit on (default 40)")
    add("--loss-batches", type=int, default=8, help="batches that the losses are measured on (default 8)")
    add("--batch-size", type=int, default=FIT_BATCH, help="drawings in each of them (default 8)")
    add("--ridge", type=float, default=FitSettings.ridge, help=f"of the fit (default {FitSettings.ridge})")
    add("--prompts", type=int, default=200, help="held-out prompts sampled; 0: none (default 200)")
    add("--prompts-large", type=int, default=100, help="of them at twice the size (default 100)")
    add("--steps", type=int, default=20, help="sampling steps (default 20)")
    add("--repeats", type=int, default=5, help="timed passes of each network (default 5)")
    add_device(parser)
    args = parser.parse_args(arguments)
    unknown = [name for name in args.shapes if name not in SHAPES]
    if unknown:
        parser.error(f"unknown shapes {', '.join(unknown)}; --list prints those there are")
    return args


def main() -> None:
    args = parse()
    if args.list:
        print("\n".join(SHAPES))
        return
    use_device(args.device)
    try:
        run(args)
    except DeltaConvError as error:
        raise SystemExit(f"error: {error}") from error


def run(args: Namespace) -> None:
    teacher = Teacher(args.teacher)
    args.output.mkdir(parents=True, exist_ok=True)
    files = fitted_files(teacher, args) | dict(args.student)
    rows = {name: losses_of(teacher, name, file, args) for name, file in files.items()}
    seconds = times_of(teacher, files, args)
    pictures = pictures_of(files, args)
    for name, row in rows.items():
        row |= {"seconds": seconds[name], "pictures": pictures.get(name, {})}
    attention = {"seconds": seconds[evaluate.TEACHER], "pictures": pictures.get(evaluate.TEACHER, {})}
    rows = {evaluate.TEACHER: attention} | rows
    write_json(args.output / "hybrids.json", rows)
    text = table(rows)
    (args.output / "hybrids.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def fitted_files(teacher: Teacher, args: Namespace) -> dict[str, Path]:
    """Name of each shape -> its weights; those that are missing are fitted, all in one pass."""
    key = {name: getattr(args, name) for name in ("fit_batches", "batch_size", "ridge")}
    key["teacher"] = evaluate.sha256(args.teacher)
    files = {name: args.output / "weights" / f"{name}.safetensors" for name in args.shapes}
    (args.output / "weights").mkdir(exist_ok=True)
    missing = [
        name
        for name, file in files.items()
        if not file.exists() or load_checkpoint(file).metadata.get("fit") != json.dumps(key)
    ]
    if missing:
        state = args.output / f"fit-{_short(json.dumps([key, missing]))}.safetensors"
        settings = FitSettings(ridge=args.ridge, held_out=4)
        with tqdm(total=args.fit_batches, desc=f"fitting {len(missing)} shapes", mininterval=10) as bar:
            fitted = fit_shapes(
                teacher,
                {name: SHAPES[name] for name in missing},
                teacher.batches(args.batch_size, FIT_SEED),
                args.fit_batches,
                settings,
                state,
                lambda done: bar.update(done - bar.n),
            )
        for name in missing:
            errors = {site: one.error for site, one in fitted[name].items()}
            starts = {site: one.start_error for site, one in fitted[name].items()}
            metadata = {"fit": json.dumps(key), "errors": json.dumps(errors), "starts": json.dumps(starts)}
            save_checkpoint(checkpoint_of(teacher, fitted[name], metadata), files[name])
        state.unlink(missing_ok=True)
    return files


def mixers_of(teacher: Teacher, file: Path) -> dict[str, Callable[..., torch.Tensor]]:
    """Site -> what stands there, called as (x, grid) -> y."""
    mixers = load_linear(file) if is_linear(file) else load_checkpoint(file).blocks
    return {
        site: Between(teacher, site, mixer) if isinstance(mixer, HybridMixer) else mixer
        for site, mixer in ((site, mixer.float().to(teacher.device)) for site, mixer in mixers.items())
    }


def losses_of(teacher: Teacher, name: str, file: Path, args: Namespace) -> dict[str, Any]:
    """The losses on held-out drawings, and the errors of the fit; kept in the folder."""
    key = f"{evaluate.sha256(file)} {evaluate.sha256(args.teacher)} {args.loss_batches} {args.batch_size}"
    kept = args.output / f"losses-{_short(key)}.json"
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    row: dict[str, Any] = distillation_losses(
        teacher, mixers_of(teacher, file), args.loss_batches, args.batch_size, name
    )
    if not is_linear(file):
        texts = load_checkpoint(file).metadata
        row |= {part: json.loads(texts[part]) for part in ("errors", "starts") if part in texts}
    write_json(kept, row)
    return row


def distillation_losses(
    teacher: Teacher, mixers: Mapping[str, Any], count: int, batch_size: int, name: str
) -> dict[str, float]:
    """The paper's feature and output loss with ``mixers`` at their sites, on ``count`` held-out batches."""
    batches = teacher.batches(batch_size, HELD_OUT_SEED)
    sums = {"feature": 0.0, "teacher": 0.0}
    network, settings = teacher.network, Distillation(checkpointing=False)
    with tapped(network.attentions, mixers, network.grids) as taps, torch.no_grad():
        task = EndToEnd(network, taps, settings)
        for number in tqdm(range(count), desc=name, mininterval=10):
            losses = task(batches(number), lambda loss: None)
            sums = {part: total + float(losses[part]) / count for part, total in sums.items()}
    return {"feature": sums["feature"], "output": sums["teacher"]}


def times_of(teacher: Teacher, files: Mapping[str, Path], args: Namespace) -> dict[str, float]:
    """Seconds of a pass of the whole network for one batch of the training size; the median of turns."""
    network, batch = teacher.network, teacher.batches(args.batch_size, HELD_OUT_SEED)(1)

    def passing(file: Path | None) -> Callable[[], None]:
        mixers = {} if file is None else mixers_of(teacher, file)

        def run() -> None:
            tapping = tapped(network.attentions, mixers, network.grids)
            with torch.no_grad(), tapping as taps, taps.mode(mixing=True):
                network(batch)

        return run

    runs = {evaluate.TEACHER: passing(None)} | {name: passing(file) for name, file in files.items()}
    taken = bench.alternate(runs, teacher.device, args.repeats)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def pictures_of(files: Mapping[str, Path], args: Namespace) -> dict[str, Any]:
    """What `demo.study.evaluate` measures, by model and size."""
    if not args.prompts:
        return {}
    folder = args.output / "evaluation"
    options = Namespace(
        teacher=args.teacher,
        student=list(files.items()),
        prompts=args.prompts,
        prompts_large=args.prompts_large,
        size=48,
        steps=args.steps,
        steps_large=None,
        cfg=3.0,
        seed=0,
        batch=40,
        reference=4000,
        output=folder,
    )
    evaluate.run(options)
    models = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["models"]
    return {name: model["sizes"] for name, model in models.items()}


def table(rows: Mapping[str, dict[str, Any]]) -> str:
    """A line for each, the best PSNR at each size and all within its noise marked with *."""
    sizes = sorted({side for row in rows.values() for side in row["pictures"]}, key=int)
    best = {side: max((_psnr(row, side) for row in rows.values()), default=(0.0, 0.0)) for side in sizes}
    heads = ["mixer", "layer error", "not fitted", "feature loss", "output loss", "ms"]
    heads += [f"{what}, {side}" for side in sizes for what in ("GFLOP", "PSNR", "words", "Fréchet")]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, row in rows.items():
        errors = [
            statistics.mean(row[part].values()) if part in row else None for part in ("errors", "starts")
        ]
        cells = [name, *(_cell(error, 3) for error in errors)]
        cells += [_cell(row.get("feature"), 3), _cell(row.get("output"), 5), f"{1000 * row['seconds']:.0f}"]
        for side in sizes:
            cells += _picture_cells(row, side, best[side])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _picture_cells(row: Mapping[str, Any], side: str, best: tuple[float, float]) -> list[str]:
    found = row["pictures"].get(side)
    if not found:
        return [""] * 4
    psnr = ""
    if "psnr" in found:
        value, error = _psnr(row, side)
        equal = best[0] - value <= NOISE * (error**2 + best[1] ** 2) ** 0.5
        psnr = f"{value:.1f} ± {error:.1f}{' *' if equal else ''}"
    return [f"{found['gflop']:.3f}", psnr, f"{found['mean']:.3f}", f"{found['frechet']:.1f}"]


def _psnr(row: Mapping[str, Any], side: str) -> tuple[float, float]:
    """Mean and standard error; below all where there is none."""
    found = row["pictures"].get(side, {})
    return found.get("psnr", float("-inf")), found.get("psnr_error", 0.0)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


if __name__ == "__main__":
    main()
