"""The options of `distill`, one by one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ...distill import Settings
from ...distill.settings import FEATURES, OPTIMIZERS
from ...errors import DeltaConvError
from ...sites.choose_specs import AUTO, FORMS, LEAN
from ...util.devices import SHORT_DTYPES

PREDICTIONS = ("epsilon", "v_prediction")


def number(text: str) -> float:
    """A finite one."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def pair(text: str) -> tuple[float, float]:
    """Two numbers with a comma between them, in brackets or not."""
    first, second = (number(part) for part in text.strip("[]").split(","))
    return first, second


def switch(text: str) -> bool:
    """JSON's words for it, and YAML's."""
    return {"true": True, "false": False}[text.lower()]


EXPECTED = {
    int: "a whole number",
    number: "a number",
    pair: "two numbers such as 0.9,0.99",
    switch: "true or false",
}


def _about(
    part: str,
    text: str,
    *,
    kind: Callable[[str], Any] = str,
    shown: str = "",
    choices: tuple[str, ...] = (),
) -> dict[str, Any]:
    """What is known of an option beside its name and default.

    Args:
        part: heading in the help.
        text: what the option does, with its unit.
        kind: makes a value of a text.
        shown: stands for the value in the help, or for a default that is worked out later.
        choices: the texts that are allowed, if not all.
    """
    return {"part": part, "text": text, "kind": kind, "shown": shown, "choices": choices}


DATA, BLOCKS, TRAINING, RUN = "teacher and data", "blocks", "training", "the run"
DEFAULTS: dict[str, Any] = {one.name: one.default for one in fields(Settings)}


@dataclass(frozen=True)
class Options:
    """All that a run is told; the names are those on the command line, with "_" in place of "-"."""

    model: Path = field(
        metadata=_about(
            DATA,
            "the teacher: the folder of a diffusers pipeline (Stable Diffusion 1.x, 2.x, SDXL, PixArt), or a "
            ".safetensors file with a whole Stable Diffusion model",
            kind=Path,
        )
    )
    data: Path = field(
        metadata=_about(
            DATA,
            "folder of pictures, with a caption in a .txt file of the same name beside each, or in a "
            "metadata.jsonl",
            kind=Path,
        )
    )
    variant: str | None = field(
        default=None,
        metadata=_about(
            DATA, "which of the weights in a diffusers folder, such as fp16", shown="those without a name"
        ),
    )
    model_config: Path | None = field(
        default=None,
        metadata=_about(
            DATA,
            "for a model in one file: a diffusers folder of the same kind, whose configuration and "
            "tokenizers are used",
            kind=Path,
            shown="built in, for Stable Diffusion 1.x, 2.x and SDXL",
        ),
    )
    tokenizer: Path | None = field(
        default=None,
        metadata=_about(
            DATA,
            "for a model in one file: a folder with CLIP's vocab.json and merges.txt, such as "
            "ComfyUI/comfy/sd1_tokenizer",
            kind=Path,
            shown="the one of the ComfyUI around this package, else from the Hugging Face Hub",
        ),
    )
    prediction: str | None = field(
        default=None,
        metadata=_about(
            DATA,
            "what the teacher predicts; needed for Stable Diffusion 2.x in one file, which does not tell",
            choices=PREDICTIONS,
            shown="as its scheduler's configuration says",
        ),
    )
    caption_column: str = field(
        default="text", metadata=_about(DATA, "name of the captions in metadata.jsonl")
    )
    resolution: int | None = field(
        default=None,
        metadata=_about(
            DATA,
            "side, in pixels, of a square with as many pixels as the pictures are scaled to",
            kind=int,
            shown="the teacher's own",
        ),
    )
    max_ratio: float = field(
        default=2.0,
        metadata=_about(
            DATA,
            "largest ratio of width to height, or of height to width, of the sizes that pictures are cut to",
            kind=number,
        ),
    )
    caption_dropout: float = field(
        default=0.15,
        metadata=_about(
            DATA,
            "part of the captions, from 0 to 1, that an empty one stands in for, picture by picture",
            kind=number,
        ),
    )
    cache: Path | None = field(
        default=None,
        metadata=_about(
            DATA,
            "folder for encoded pictures and captions; several runs may share it",
            kind=Path,
            shown="cache in the folder of the run",
        ),
    )
    blocks: str = field(
        default="all",
        metadata=_about(
            BLOCKS,
            "self-attentions to learn: a comma list of all, down, mid, up, names, globs; - in front excludes",
        ),
    )
    kernel_sizes: str = field(
        default=AUTO,
        metadata=_about(
            BLOCKS,
            "side K of the blocks' kernels, odd, in tokens: auto (the authors' where they have some), a "
            'number, JSON such as {"down": 7, "mid_block": 5}, or a .json file with such or with a '
            "recommendation that `locality` wrote, whose skipped sites stay attention",
        ),
    )
    form: str = field(
        default=LEAN,
        metadata=_about(
            BLOCKS,
            "what the blocks are made of: lean (fewer channels inside and a context stage) or released (as "
            "in the weights that the authors published)",
            choices=FORMS,
        ),
    )
    layer_steps: int = field(
        default=DEFAULTS["layer_steps"],
        metadata=_about(
            TRAINING,
            "steps of the first stage, in which every block learns its own attention's output",
            kind=int,
        ),
    )
    output_steps: int = field(
        default=DEFAULTS["output_steps"],
        metadata=_about(
            TRAINING, "steps of the second stage, in which the blocks learn end to end", kind=int
        ),
    )
    batch_size: int = field(
        default=1, metadata=_about(TRAINING, "pictures in a batch, those of all processes together", kind=int)
    )
    accumulation: int = field(
        default=DEFAULTS["accumulation"],
        metadata=_about(TRAINING, "batches whose gradients make one step", kind=int),
    )
    learning_rate: float = field(
        default=DEFAULTS["learning_rate"],
        metadata=_about(TRAINING, "peak of AdamW's, in both stages", kind=number),
    )
    warmup: int = field(
        default=DEFAULTS["warmup"],
        metadata=_about(TRAINING, "steps at the start of each stage in which the rate rises", kind=int),
    )
    decay: float = field(
        default=DEFAULTS["decay"],
        metadata=_about(
            TRAINING,
            "the last part of each stage, from 0 to 1, in which the rate falls to a twentieth",
            kind=number,
        ),
    )
    betas: tuple[float, float] = field(
        default=DEFAULTS["betas"], metadata=_about(TRAINING, "of AdamW", kind=pair, shown="A,B")
    )
    weight_decay: float = field(
        default=DEFAULTS["weight_decay"], metadata=_about(TRAINING, "of AdamW", kind=number)
    )
    clip: float = field(
        default=DEFAULTS["clip"],
        metadata=_about(TRAINING, "largest norm of the gradient; 0 does not clip", kind=number),
    )
    ema: float = field(
        default=DEFAULTS["ema"],
        metadata=_about(
            TRAINING,
            "part of the averaged weights that stays at each step, from 0 to below 1; they are the result; 0 "
            "takes the last weights",
            kind=number,
        ),
    )
    precision: str = field(
        default=AUTO,
        metadata=_about(
            TRAINING,
            "what is computed in. auto: what `accelerate launch --mixed_precision` says, else bf16, fp16 on "
            "GPUs without it, fp32 on a CPU. The blocks' weights are fp32 while they learn",
            choices=(AUTO, *SHORT_DTYPES),
        ),
    )
    optimizer: str = field(
        default=DEFAULTS["optimizer"],
        metadata=_about(TRAINING, "adamw8bit needs the package bitsandbytes", choices=OPTIMIZERS),
    )
    beta: float = field(
        default=DEFAULTS["beta"],
        metadata=_about(
            TRAINING, "weight of the feature loss beside the output losses in the second stage", kind=number
        ),
    )
    gamma: float = field(
        default=DEFAULTS["gamma"],
        metadata=_about(
            TRAINING, "of Min-SNR: the signal-to-noise ratio above which a loss weighs less", kind=number
        ),
    )
    feature: str = field(
        default=DEFAULTS["feature"],
        metadata=_about(
            TRAINING,
            "what the feature loss compares: the blocks' output with attention's (the paper), or the "
            "residual stream that it is added to (the authors' code)",
            choices=FEATURES,
        ),
    )
    checkpointing: bool = field(
        default=DEFAULTS["checkpointing"],
        metadata=_about(
            TRAINING, "in the second stage, run the model's parts twice to need far less memory", kind=switch
        ),
    )
    seed: int = field(
        default=DEFAULTS["seed"],
        metadata=_about(TRAINING, "of the blocks, the noise and the order", kind=int),
    )
    output: Path = field(
        default=Path("distilled"),
        metadata=_about(
            RUN,
            "folder of the run. Where there is a run already, it goes on; a finished one, with more steps. "
            "The result is deltaconv.safetensors",
            kind=Path,
        ),
    )
    save_every: int = field(
        default=DEFAULTS["save_every"],
        metadata=_about(RUN, "steps between saved states and results", kind=int),
    )
    license: str = field(
        default="", metadata=_about(RUN, "of the result, such as MIT; kept in the file", shown="none stated")
    )
    tensorboard: bool = field(
        default=False,
        metadata=_about(RUN, "write losses for TensorBoard to the folder of the run", kind=switch),
    )
    device: str | None = field(
        default=None,
        metadata=_about(RUN, "cpu, to leave GPUs alone", choices=("cpu",), shown="a GPU, where there is one"),
    )
    timeout: float = field(
        default=30.0,
        metadata=_about(RUN, "minutes that processes wait for each other before they give up", kind=number),
    )

    def __post_init__(self) -> None:
        for name in ("batch_size", "timeout"):
            if getattr(self, name) <= 0:
                raise DeltaConvError(f"expected {name} to be above 0, got {getattr(self, name)}")
        if not 0 <= self.caption_dropout <= 1:
            raise DeltaConvError(f"expected caption_dropout from 0 to 1, got {self.caption_dropout}")
        if self.max_ratio < 1:
            raise DeltaConvError(f"expected max_ratio to be at least 1, got {self.max_ratio}")

    def settings(self, precision: str) -> Settings:
        """What the training itself is told, with `precision` decided."""
        values = {name: getattr(self, name) for name in DEFAULTS}
        return Settings(**values | {"precision": precision})

    def to_json(self) -> str:
        """A file for `--config`."""
        return json.dumps(asdict(self), indent=1, default=lambda path: str(path.resolve()))
