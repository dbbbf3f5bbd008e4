"""One run of `distill`: from a model and a folder of pictures to trained blocks."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...block.spec import BlockSpec
from ...distill import Result, RunFolder, Settings, check_same_run, distill, session
from ...distill.optimizer import make_optimizer
from ...distill.run_folder import State
from ...errors import DeltaConvError
from ...sites import select
from ...sites.choose_specs import AUTO, ModelShape, block_specs
from ...util.devices import SHORT_DTYPES
from .accelerated import AcceleratedProcesses
from .batches import Batches
from .cache import Cache
from .network import DiffusersNetwork
from .options import Options
from .pictures import find_pictures
from .progress import ProgressBar, Stop, Stopped, through
from .run_files import OPTIONS_FILE, RESULT_FILE, write_result
from .samples import Samples, encode_samples
from .teacher import Teacher, load_teacher, weights_fingerprint

log = logging.getLogger(__name__)


def train(options: Options) -> int:
    """Trains as the options say, alone or as one of the processes of `accelerate launch`.

    Returns:
        The exit status: 0, or 130 if the user stopped it.

    Raises:
        DeltaConvError: options that do not go together, data or a model that cannot be used, a saved run that
            is another one, or processes that lost each other.
    """
    processes = AcceleratedProcesses(options.device == "cpu", options.timeout)
    settings = options.settings(_precision(options.precision, processes))
    processes.part(options.batch_size)  # what can be refused, is refused before anything slow is done
    make_optimizer([torch.zeros(1)], settings)
    stop = Stop()
    curves = options.output / "tensorboard" if options.tensorboard else None
    progress = ProgressBar(processes, settings.steps, stop, curves)
    tell = log.warning if processes.is_main else log.debug
    pictures = find_pictures(options.data, options.caption_column, tell)
    teacher = load_teacher(options, SHORT_DTYPES[settings.precision])
    specs = _specs(options, teacher)
    sizes = options.resolution or teacher.resolution, options.max_ratio
    notes = session.notes(
        weights_fingerprint(teacher.network),
        specs,
        options.batch_size,
        options.caption_dropout,
        prediction=teacher.prediction,
        schedule=teacher.schedule,
        sizes="{} pixels squared, ratio up to {}".format(*sizes),
    )
    check_same_run(RunFolder(options.output), settings, notes)
    cache = Cache(options.cache or options.output / "cache")
    samples = encode_samples(teacher, pictures, sizes, cache, processes, through(processes))
    notes["data"] = samples.fingerprint
    network = DiffusersNetwork(teacher, specs)
    network.model.to(processes.device)
    batches = Batches(network, samples, options.batch_size, options.seed, options.caption_dropout, processes)
    metadata = _metadata(options, settings, samples, notes)

    def write(state: State) -> None:
        (options.output / OPTIONS_FILE).write_text(options.to_json(), encoding="utf-8")
        write_result(options.output, teacher.sites.architecture, specs, metadata, state)

    def attention(site: str) -> _InFloat32:
        return _InFloat32(network.attentions[site])

    folder = RunFolder(options.output, processes.is_main, write)
    processes.say(_plan(options, settings, specs, samples, processes))
    with stop.listening(), network.told():
        mixers = session.start_blocks(specs, settings.seed, processes.device, attention)
        try:
            result = distill(network, mixers, batches, settings, folder, progress, notes, processes)
        except Stopped:
            result = None
        finally:
            progress.close()
    if result is None:
        processes.say(f"Stopped; the run is kept in {folder.path}. The same command resumes it.")
        return 130
    _check(result, options.output / RESULT_FILE)
    processes.say(
        f"Done: {result.step} steps. {folder.path / RESULT_FILE} is ready for ComfyUI and for diffusers."
    )
    return 0


def _plan(
    options: Options,
    settings: Settings,
    specs: Mapping[str, BlockSpec],
    samples: Samples,
    processes: AcceleratedProcesses,
) -> str:
    """What is trained, and how."""
    groups = [len(group) for group in samples.groups()]
    few = sum(size for size in groups if size < options.batch_size)
    return (
        f"{session.summary(specs)} learn from {samples.description}: batches of {options.batch_size}, "
        f"{settings.accumulation} to a step, {settings.precision}, processes: {processes.count} "
        f"({processes.device})."
        + (f" Pictures of sizes with less than a batch, seen more often: {few}." if few else "")
    )


def _check(result: Result, file: Path) -> None:
    """Raises an error where the training ended early."""
    if not result.step:
        raise DeltaConvError(f"nothing was learned: {result.stopped}")
    if result.stopped:
        raise DeltaConvError(
            f"the training ended early: {result.stopped} ({file} holds what was learned before)"
        )


@dataclass(frozen=True)
class _InFloat32:
    """An attention that takes and gives float32, whatever its weights are."""

    attention: nn.Module

    def __call__(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.attention(tokens.to(next(self.attention.parameters()).dtype))
        return y.to(tokens.dtype)


def _precision(wanted: str, processes: AcceleratedProcesses) -> str:
    """What is computed in, where "auto" leaves it open."""
    if wanted != AUTO:
        return wanted
    if processes.mixed_precision != "no":
        if processes.mixed_precision not in SHORT_DTYPES:
            raise DeltaConvError(
                f"accelerate's mixed precision {processes.mixed_precision!r} is not known here; choose bf16 "
                "or fp16"
            )
        return processes.mixed_precision
    if processes.device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def _specs(options: Options, teacher: Teacher) -> dict[str, BlockSpec]:
    channels = teacher.sites.channels
    shape = ModelShape(teacher.sites.architecture, channels, teacher.levels)
    return block_specs(
        shape, select(options.blocks, channels), _kernel_sizes(options.kernel_sizes), options.form
    )


def _kernel_sizes(text: str) -> str:
    """The text itself, or that in the file it names."""
    if not text.lower().endswith(".json"):
        return text
    try:
        return Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DeltaConvError(f"cannot read the kernel sizes in {text} ({error}); check its name") from error


def _metadata(
    options: Options, settings: Settings, samples: Samples, notes: Mapping[str, str]
) -> dict[str, str]:
    training = settings.to_dict() | {
        "batch_size": options.batch_size,
        "caption_dropout": options.caption_dropout,
        "resolution": options.resolution,
    }
    source = "distilled with python -m deltaconv_core distill"
    metadata = session.metadata(options.model.resolve().name, training, samples.description, source, notes)
    return metadata | ({"license": options.license} if options.license else {})
