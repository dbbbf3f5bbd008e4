"""The options of `distill`, one by one."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ...distill.fields import DATA, RUN, about
from ...distill.job import Job

PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
"""As diffusers calls them, and as the core's tasks do."""


@dataclass(frozen=True, kw_only=True)
class Options(Job):
    """All that the command is told; the names are those on the command line, with "_" in place of "-"."""

    model: Path = field(
        metadata=about(
            DATA,
            "the teacher: the folder of a diffusers pipeline (Stable Diffusion 1.x, 2.x, SDXL, PixArt), or a "
            ".safetensors file with a whole Stable Diffusion model",
        )
    )
    data: Path = field(
        metadata=about(
            DATA,
            "folder of pictures, with a caption in a .txt file of the same name beside each, or in a "
            "metadata.jsonl",
        )
    )
    variant: str | None = field(
        default=None,
        metadata=about(
            DATA, "which of the weights in a diffusers folder, such as fp16", shown="those without a name"
        ),
    )
    model_config: Path | None = field(
        default=None,
        metadata=about(
            DATA,
            "for a model in one file: a diffusers folder of the same kind, whose configuration and "
            "tokenizers are used",
            shown="built in, for Stable Diffusion 1.x, 2.x and SDXL",
        ),
    )
    tokenizer: Path | None = field(
        default=None,
        metadata=about(
            DATA,
            "for a model in one file: a folder with CLIP's vocab.json and merges.txt, such as "
            "ComfyUI/comfy/sd1_tokenizer",
            shown="the one of the ComfyUI around this package, else from the Hugging Face Hub",
        ),
    )
    prediction: str | None = field(
        default=None,
        metadata=about(
            DATA,
            "what the teacher predicts; needed for Stable Diffusion 2.x in one file, which does not say",
            choices=tuple(PREDICTIONS),
            shown="as its scheduler's configuration says",
        ),
    )
    caption_column: str = field(
        default="text", metadata=about(DATA, "name of the captions in metadata.jsonl")
    )
    resolution: int | None = field(
        default=None,
        metadata=about(
            DATA,
            "side, in pixels, of a square with as many pixels as the pictures are scaled to",
            shown="the teacher's own",
        ),
    )
    max_ratio: float = field(
        default=2.0,
        metadata=about(
            DATA,
            "largest ratio of width to height, or of height to width, of the sizes that pictures are cut to",
            least=1,
        ),
    )
    cache: Path | None = field(
        default=None,
        metadata=about(
            DATA,
            "folder for encoded pictures and captions; several runs may share it",
            shown="cache in the folder of the run",
        ),
    )
    output: Path = field(
        default=Path("distilled"),
        metadata=about(
            RUN,
            "folder of the run. A run that is there is resumed; a finished one is extended when more steps "
            "are asked for. The result is deltaconv.safetensors",
        ),
    )
    license: str = field(
        default="",
        metadata=about(RUN, "license of the result, such as MIT; kept in the file", shown="none stated"),
    )
    tensorboard: bool = field(
        default=False, metadata=about(RUN, "write losses for TensorBoard to the folder of the run")
    )
    device: str | None = field(
        default=None,
        metadata=about(
            RUN,
            "what to compute on; cpu leaves GPUs alone",
            choices=("cpu",),
            shown="a GPU, where there is one",
        ),
    )
    timeout: float = field(
        default=30.0,
        metadata=about(RUN, "minutes that processes wait for each other before they give up", above=0),
    )

    def to_json(self) -> str:
        """A file for `--config`."""
        return json.dumps(asdict(self), indent=1, default=lambda path: str(path.resolve()))
