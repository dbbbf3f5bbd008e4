"""`make demo`: the demo workflow in a real ComfyUI server, and its pictures side by side under output/."""

from __future__ import annotations

import argparse
import copy
import io
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import workflow
from comfy_host import REPOSITORY, HostNotFound
from comfy_server import ComfyServer, ServerError

WORKFLOW = REPOSITORY / "workflows" / "attention_and_deltaconv.json"


@dataclass(frozen=True)
class Row:
    """One way of making the pictures: a SaveImage node, and the sampler that its pictures come from."""

    name: str
    save: str
    sampler: str


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--output", type=Path, default=REPOSITORY / "output", help="where the pictures go")
    output = options.parse_args().output
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave through `with`, as Ctrl-C does
    try:
        run(output)
    except (HostNotFound, ServerError, workflow.WorkflowError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nStopped; nothing is left running.")


def run(output: Path) -> None:
    say("Starting ComfyUI (CPU) with this extension")
    with ComfyServer() as server:
        say(f"ComfyUI answers at {server.url}; sending {WORKFLOW.relative_to(REPOSITORY)}")
        prompt = workflow.to_prompt(workflow.load(WORKFLOW), server.object_info())
        rows = find_rows(prompt)
        say("Once without watching the clock, so that models are loaded and memory is there")
        server.run(warm_up(prompt))
        watch = Watch(prompt)
        say("Now the pictures")
        with watch:
            outputs = server.run(prompt, watch)
        pictures = {
            row: [picture(server.view(image)) for image in outputs[row.save]["images"]] for row in rows
        }
    report(output, pictures, watch.seconds)


def say(text: str) -> None:
    print(f"==> {text}", flush=True)


def find_rows(prompt: dict[str, Any]) -> list[Row]:
    """Every SaveImage of the prompt, with the sampler upstream of it."""
    return [
        Row(node["_meta"]["title"], key, sampler_of(prompt, key))
        for key, node in prompt.items()
        if node["class_type"] == "SaveImage"
    ]


def sampler_of(prompt: dict[str, Any], key: str) -> str:
    """The nearest KSampler upstream of a node that has one linked input leading there."""
    while prompt[key]["class_type"] != "KSampler":
        inputs = prompt[key]["inputs"]
        key = next(inputs[name][0] for name in ("images", "image", "samples") if name in inputs)
    return key


def warm_up(prompt: dict[str, Any]) -> dict[str, Any]:
    """The same prompt with few steps, so that ComfyUI has to sample again afterwards."""
    short = copy.deepcopy(prompt)
    for node in short.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 2
    return short


class Watch:
    """Follows a prompt: a progress bar for each sampler, and how long each node took."""

    def __init__(self, prompt: dict[str, Any]) -> None:
        self.prompt = prompt
        self.seconds: dict[str, float] = {}
        self._node: str | None = None
        self._since = 0.0
        self._bar: tqdm[Any] | None = None

    def __call__(self, kind: str, data: dict[str, Any]) -> None:
        if kind == "executing":
            self._finish()
            self._node, self._since = data["node"], time.perf_counter()
        elif kind == "progress":
            if self._bar is None:
                title = self.prompt[data["node"]]["_meta"]["title"]
                self._bar = tqdm(total=data["max"], desc=title, unit="step", file=sys.stdout)
            self._bar.update(data["value"] - self._bar.n)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()

    def _finish(self) -> None:
        if self._node is not None:
            self.seconds[self._node] = time.perf_counter() - self._since
        if self._bar is not None:
            self._bar.close()
        self._node = self._bar = None


def picture(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png), formats=("PNG",)).convert("RGB")


def report(output: Path, pictures: dict[Row, list[Image.Image]], seconds: dict[str, float]) -> None:
    """Save every picture and the sheet, and print the times and where to look."""
    output.mkdir(parents=True, exist_ok=True)
    labels = []
    for row, images in pictures.items():
        name = ascii_name(row.name)
        labels.append(f"{name}\n{seconds[row.sampler]:.2f} s")
        for number, image in enumerate(images, start=1):
            image.save(output / f"{name.lower()}_{number}.png")
        print(f"{row.name:>16}: {len(images)} pictures sampled in {seconds[row.sampler]:.2f} s")
    file = output / "side_by_side.png"
    sheet(labels, list(pictures.values())).save(file)
    print(f"\nLook at {file}\nThe single pictures are beside it.")


def ascii_name(name: str) -> str:
    """For file names, and for the sheet, whose font has no Δ."""
    return name.replace("Δ", "Delta")


def sheet(labels: list[str], rows: list[list[Image.Image]], gap: int = 12, margin: int = 170) -> Image.Image:
    """One row of pictures per label, the label on its left."""
    width, height = rows[0][0].size
    size = (margin + max(map(len, rows)) * (width + gap), gap + len(rows) * (height + gap))
    page = Image.new("RGB", size, "#f4f4f4")
    draw = ImageDraw.Draw(page)
    for down, (label, images) in enumerate(zip(labels, rows, strict=True)):
        top = gap + down * (height + gap)
        draw.multiline_text((gap, top + height // 2), label, "#222222", ImageFont.load_default(20), "lm")
        for across, image in enumerate(images):
            page.paste(image, (margin + across * (width + gap), top))
    return page


if __name__ == "__main__":
    main()
