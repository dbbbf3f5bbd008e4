"""One run of `distill`: from a model and a folder of pictures to trained blocks."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...block import DeltaConvBlock
from ...block.spec import BlockSpec
from ...distill import Result, RunFolder, Settings, check_same_run, distill, warm_start
from ...distill.optimizer import make_optimizer
from ...errors import DeltaConvError
from ...sites import select
from ...sites.choose_specs import AUTO, ModelShape, block_specs
from ...util.devices import SHORT_DTYPES
from .accelerated import Processes
from .batches import Batches
from .cache import Cache
from .network import DiffusersNetwork
from .options import Options
from .output import Output
from .pictures import find_pictures
from .progress import Progress, Stop, Stopped, through
from .samples import Samples, encode
from .teacher import Teacher, fingerprint, load_teacher

log = logging.getLogger(__name__)


def train(options: Options) -> int:
    """Trains as the options say, alone or as one of the processes of `accelerate launch`.

    Returns:
        The exit status: 0, or 130 if the user stopped it.

    Raises:
        DeltaConvError: options that do not go together, data or a model that cannot be used, a saved run that
            is another one, or processes that lost each other.
    """
    processes = Processes(options.device == "cpu", options.timeout)
    settings = options.settings(_precision(options.precision, processes))
    processes.part(options.batch_size)  # what can be refused, is refused before anything slow is done
    make_optimizer([torch.zeros(1)], settings)
    stop = Stop()
    curves = options.output / "tensorboard" if options.tensorboard else None
    progress = Progress(processes, settings.steps, stop, curves)
    tell = log.warning if processes.is_main else log.debug
    pictures = find_pictures(options.data, options.caption_column, tell)
    teacher = load_teacher(options, SHORT_DTYPES[settings.precision])
    specs = _specs(options, teacher)
    sizes = options.resolution or teacher.resolution, options.max_ratio
    notes = {
        "teacher": fingerprint(teacher.network),
        "prediction": teacher.prediction,
        "schedule": teacher.schedule,
        "sizes": "{} pixels squared, ratio up to {}".format(*sizes),
        "batch_size": str(options.batch_size),
        "caption_dropout": str(options.caption_dropout),
        "blocks": json.dumps({site: spec.to_dict() for site, spec in specs.items()}),
    }
    check_same_run(RunFolder(options.output), settings, notes)
    cache = Cache(options.cache or options.output / "cache")
    samples = encode(teacher, pictures, sizes, cache, processes, through(processes))
    notes["data"] = samples.fingerprint
    metadata = _metadata(options, settings, samples, notes)
    output = Output(
        options.output, processes.is_main, teacher.sites.architecture, specs, metadata, options.to_json()
    )
    network = _network(teacher, specs, processes)
    batches = Batches(network, samples, options.batch_size, options.seed, options.caption_dropout, processes)
    run = _Run(options, settings, processes, network, specs, progress)
    with stop.listening():
        return run(batches, output, notes)


class _Run:
    """The training itself, and what is said when it ends."""

    def __init__(
        self,
        options: Options,
        settings: Settings,
        processes: Processes,
        network: DiffusersNetwork,
        specs: Mapping[str, BlockSpec],
        progress: Progress,
    ) -> None:
        self.options = options
        self.settings = settings
        self.processes = processes
        self.network = network
        self.specs = specs
        self.progress = progress

    def __call__(self, batches: Batches, output: Output, notes: Mapping[str, str]) -> int:
        self.say(self._plan(batches))
        with self.network.told():
            mixers = self._start()
            try:
                result = distill(
                    self.network, mixers, batches, self.settings, output, self.progress, notes, self.processes
                )
            except Stopped:
                self.progress.close()
                self.say(f"Stopped; the run is kept in {output.path}. The same command goes on with it.")
                return 130
            finally:
                self.progress.close()
        return self._end(result, output)

    def say(self, text: str) -> None:
        """Prints once for all processes."""
        if self.processes.is_main:
            print(text, flush=True)

    def _plan(self, batches: Batches) -> str:
        parameters = sum(spec.num_parameters for spec in self.specs.values()) / 1e6
        settings, count = self.settings, self.processes.count
        groups = [len(group) for group in batches.samples.groups()]
        few = sum(size for size in groups if size < self.options.batch_size)
        return (
            f"{len(self.specs)} blocks ({parameters:.3g} M parameters) learn from "
            f"{batches.samples.description}: batches of {self.options.batch_size}, {settings.accumulation} "
            f"to a step, {settings.precision}, processes: {count} ({self.processes.device})."
            + (f" Pictures of sizes with less than a batch, seen more often: {few}." if few else "")
        )

    def _start(self) -> dict[str, DeltaConvBlock]:
        """New blocks on the device, each set to what its attention does on average."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            mixers = {site: DeltaConvBlock(spec, dtype=torch.float32) for site, spec in self.specs.items()}
        for site, mixer in mixers.items():
            warm_start(mixer.to(self.processes.device), _InFloat32(self.network.attentions[site]))
        return mixers

    def _end(self, result: Result, output: Output) -> int:
        if not result.step:
            raise DeltaConvError(f"nothing was learned: {result.stopped}")
        if result.stopped:
            raise DeltaConvError(
                f"the training ended early: {result.stopped} ({output.result} holds what was learned before)"
            )
        self.say(f"Done: {result.step} steps. {output.result} is ready for ComfyUI and for diffusers.")
        return 0


@dataclass(frozen=True)
class _InFloat32:
    """An attention that takes and gives float32, whatever its weights are."""

    attention: nn.Module

    def __call__(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.attention(tokens.to(next(self.attention.parameters()).dtype))
        return y.to(tokens.dtype)


def _precision(wanted: str, processes: Processes) -> str:
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
        raise DeltaConvError(f"cannot read the kernel sizes in {text} ({error})") from error


def _network(teacher: Teacher, specs: Mapping[str, BlockSpec], processes: Processes) -> DiffusersNetwork:
    teacher.network.to(processes.device)
    return DiffusersNetwork(teacher, specs)


def _metadata(
    options: Options, settings: Settings, samples: Samples, notes: Mapping[str, str]
) -> dict[str, str]:
    training = settings.to_dict() | {
        "batch_size": options.batch_size,
        "caption_dropout": options.caption_dropout,
        "resolution": options.resolution,
    }
    metadata = {
        "teacher": f"{options.model.resolve().name} {notes['teacher']}",
        "training": json.dumps(training),
        "data": f"{samples.description}, {notes['data']}",
        "source": "distilled with python -m deltaconv_core distill",
    }
    return metadata | ({"license": options.license} if options.license else {})
