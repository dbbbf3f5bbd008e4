"""`distill` as tests run it: small pipelines, drawn pictures, and processes that train together.

This module is loaded once in the process that all others are forked from, so that they start quickly.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from safetensors import safe_open

from deltaconv_core.cli import main
from scripts import comfy_host

from . import diffusers_models
from .compare import same_weights
from .diffusers_models import make, make_pipeline, make_pixart_pipeline, make_tokenizer

QUICK = {"layer_steps": 2, "output_steps": 2, "resolution": 32, "batch_size": 2, "warmup": 0}
SIZES = ((64, 64), (60, 70), (90, 50), (48, 100), (64, 64), (128, 64))  # width, height


def save_pipeline(kind: str, folder: Path) -> Path:
    """Writes a tiny pipeline as diffusers keeps them."""
    folder.mkdir(parents=True)
    made = {"sd": make_pipeline, "pixart": make_pixart_pipeline, "xl": make_xl_pipeline}[kind](folder)
    made.save_pretrained(folder)
    return folder


def make_xl_pipeline(folder: Path) -> Any:
    """A StableDiffusionXLPipeline of tiny parts; its two encoders' widths add up to the context's."""
    import diffusers
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(3)
        common = {
            "vocab_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
        }  # fmt: skip
        first = transformers.CLIPTextConfig(hidden_size=4, **common)
        second = transformers.CLIPTextConfig(hidden_size=12, projection_dim=12, **common)
        pipe = diffusers.StableDiffusionXLPipeline(
            vae=diffusers_models.make_vae(),
            text_encoder=transformers.CLIPTextModel(first).eval(),
            text_encoder_2=transformers.CLIPTextModelWithProjection(second).eval(),
            tokenizer=make_tokenizer(folder),
            tokenizer_2=make_tokenizer(folder),
            unet=make("xl"),
            scheduler=diffusers.EulerDiscreteScheduler(
                beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
            ),
            add_watermarker=False,
        )
    return pipe


def draw(folder: Path, sizes: Any = SIZES) -> Path:
    """Pictures of noise with a caption beside each."""
    folder.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(0)
    for number, (width, height) in enumerate(sizes):
        values = torch.randint(256, (height, width, 3), generator=random, dtype=torch.uint8)
        Image.fromarray(values.numpy()).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a cat {'abcdefgh'[number % 8]}")
    return folder


def arguments(**options: Any) -> list[str]:
    """A command line."""
    words = ["distill"]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, str(value)]
    return words


def distil(**options: Any) -> int:
    """The command in this process; its exit status."""
    return main(arguments(**QUICK | options))


def start() -> list[str]:
    """A command that starts the program, to be followed by `arguments`."""
    code = "from scripts.comfy_host import prepare_torchvision; prepare_torchvision(); import runpy; "
    code += "runpy.run_module('deltaconv_core', run_name='__main__', alter_sys=True)"
    return [sys.executable, "-c", code]


def environment() -> dict[str, str]:
    """Of a program that finds what this process has found."""
    return os.environ | {"PYTHONPATH": str(comfy_host.REPOSITORY)}


def last_error(capsys: Any) -> str:
    """The last line on stderr, after any bars."""
    line: str = capsys.readouterr().err.strip().split("\n")[-1].split("\r")[-1]
    return line


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's result."""
    with safe_open(folder / "deltaconv.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def same(first: Path, second: Path) -> bool:
    """Whether two runs' results are bit-identical."""
    return same_weights(weights(first), weights(second))


# ---- several processes ----

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__])


class Rank:
    """One of the processes of a run.

    Args:
        number, count, port: its place, how many there are, where they meet.
        log: file for what it prints.
        options: of the command.
    """

    def __init__(self, number: int, count: int, port: int, log: Path, **options: Any) -> None:
        self.log = log
        environment = {
            "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self.process = _context.Process(
            target=_work, args=(environment, str(log), arguments(**QUICK | {"device": "cpu"} | options))
        )
        self.process.start()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends it a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self, seconds: float = 240) -> tuple[int | None, str]:
        """Its exit status, None if it does not end in time, and what it printed."""
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
        return code, self.log.read_text()

    def wait_for(self, file: Path) -> None:
        """Waits until a file is there."""
        end = time.monotonic() + 240
        while not file.exists():
            assert self.process.is_alive() and time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)


def together(count: int, folder: Path, **options: Any) -> list[Rank]:
    """As many processes as wanted, that train together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [Rank(i, count, port, folder / f"{time.monotonic_ns()}.log", **options) for i in range(count)]


def _work(environment: dict[str, str], log: str, words: list[str]) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115
    sys.exit(main(words))
