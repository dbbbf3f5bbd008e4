"""`make demo`: six prompts through the demo workflow in a real ComfyUI server, a sheet of the pictures under
output/, and what the detector reads off each of them."""

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

import numpy as np
from PIL import Image, ImageDraw

from deltaconv_core.util.lettering import write
from demo.study.detector import read_picture
from demo.study.drawings import as_seen
from demo.words import ANY, parse_prompt

from . import workflow
from .comfy_host import REPOSITORY, HostNotFound
from .comfy_server import ComfyServer, ServerError

WORKFLOW = workflow.FOLDER / "1_start_here.json"

#: The demo model was trained on none of these combinations of words (`is_held_out` in demo.study.drawings).
PROMPTS = (
    "three blue squares on the left, gray background, frame",
    "three yellow circles at the top, gray background, mirror",
    "three green triangles in the center, black background, stripes",
    "two purple crosses on the left, white background, pairs",
    "two purple diamonds at the bottom, white background, frame",
    "three red crosses in the center, gray background, plain",
)


@dataclass(frozen=True)
class Row:
    """One way of making the pictures: its SaveImage node, and the sampler that its pictures come from."""

    name: str
    save: str
    sampler: str


@dataclass(frozen=True)
class Drawn:
    """A picture, how long its sampling took, and each word the detector read with its being right."""

    picture: Image.Image
    seconds: float
    words: list[tuple[str, bool]]

    @property
    def right(self) -> int:
        return sum(right for _, right in self.words)


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
        server.run(with_text(prompt, rows, PROMPTS[0], steps=2))
        say("Now the pictures: prompts that the model was not trained on, each twice from the same noise")
        pairs = {text: pair(server, prompt, rows, text) for text in PROMPTS}
    report(output, rows, pairs)


def say(text: str) -> None:
    print(f"==> {text}", flush=True)


def find_rows(prompt: dict[str, Any]) -> list[Row]:
    """The two ways that the prompt's ΔConv Compare shows; each gets a SaveImage in the prompt."""
    (inputs,) = (node["inputs"] for node in prompt.values() if node["class_type"] == "DeltaConvCompare")
    rows = []
    for way in ("first", "second"):
        key = f"save {way}"
        prompt[key] = {
            "class_type": "SaveImage",
            "inputs": {"images": inputs[way], "filename_prefix": f"DeltaConv/{way}"},
        }
        rows.append(Row(inputs[f"{way}_label"], key, sampler_of(prompt, key)))
    return rows


def sampler_of(prompt: dict[str, Any], key: str) -> str:
    """The nearest KSampler upstream of a node that has one linked input leading there."""
    while prompt[key]["class_type"] != "KSampler":
        inputs = prompt[key]["inputs"]
        key = next(inputs[name][0] for name in ("images", "image", "samples") if name in inputs)
    return key


def with_text(prompt: dict[str, Any], rows: list[Row], text: str, steps: int | None = None) -> dict[str, Any]:
    """The same prompt with other words, drawing one picture a row; with few ``steps`` to warm up."""
    changed = copy.deepcopy(prompt)
    for row in rows:
        inputs = changed[row.sampler]["inputs"]
        changed[inputs["positive"][0]]["inputs"]["text"] = text
        changed[inputs["latent_image"][0]]["inputs"]["batch_size"] = 1
        inputs["steps"] = steps or inputs["steps"]
    return changed


def pair(server: ComfyServer, prompt: dict[str, Any], rows: list[Row], text: str) -> list[Drawn]:
    """Draw ``text`` in each way, and print what came of it."""
    watch = Watch()
    outputs = server.run(with_text(prompt, rows, text), watch)
    print(text)
    drawn = []
    for row in rows:
        picture = decode(server.view(outputs[row.save]["images"][0]))
        drawn.append(Drawn(picture, watch.seconds[row.sampler], read(picture, text)))
        words = " ".join(word for word, _ in drawn[-1].words)
        print(
            f"{row.name:>18}  {drawn[-1].seconds:5.2f} s  {drawn[-1].right} of 6 words: {words}", flush=True
        )
    return drawn


class Watch:
    """How long each node of a prompt took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._node: str | None = None
        self._since = 0.0

    def __call__(self, kind: str, data: dict[str, Any]) -> None:
        if kind == "executing":
            now = time.perf_counter()
            if self._node is not None:
                self.seconds[self._node] = now - self._since
            self._node, self._since = data["node"], now


def decode(png: bytes) -> Image.Image:
    """The picture as the model drew it."""
    return Image.open(io.BytesIO(png), formats=("PNG",)).convert("RGB")


def enlarge(picture: Image.Image, scale: int = 5) -> Image.Image:
    return picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.NEAREST)


def read(picture: Image.Image, text: str) -> list[tuple[str, bool]]:
    """What the detector reads in the picture, a word for each kind that the demo model knows ("?" where it
    cannot tell), and whether that is what ``text`` asked for."""
    reading = read_picture(np.asarray(picture))
    right = reading.matches(as_seen(parse_prompt(text))).values()
    return list(zip(["?" if word == ANY else word for word in reading.prompt], right, strict=True))


def report(output: Path, rows: list[Row], pairs: dict[str, list[Drawn]]) -> None:
    """Save every picture and the sheet, and print the times and where to look."""
    output.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows):
        drawn = [ways[number] for ways in pairs.values()]
        name = row.name.replace("Δ", "Delta").lower()
        for index, one in enumerate(drawn, start=1):
            enlarge(one.picture).save(output / f"{name}_{index}.png")
        seconds, right = sum(one.seconds for one in drawn), sum(one.right for one in drawn)
        print(
            f"==> {row.name}: {len(drawn)} pictures sampled in {seconds:.2f} s, "
            f"{right} of {6 * len(drawn)} words right"
        )
    file = output / "side_by_side.png"
    sheet([row.name for row in rows], pairs).save(file)
    print(f"\nLook at {file}\nThe single pictures are beside it.")


# ---- the sheet ----

PAPER, INK, FAINT, WRONG = "#fbfaf7", "#222222", "#77736b", "#c8321e"
ACROSS, GAP, MARGIN, ABOVE, BELOW = 3, 8, 40, 26, 64


def sheet(names: list[str], pairs: dict[str, list[Drawn]]) -> Image.Image:
    """Three pairs in a row: above each picture its way and time, below it what was read, then the prompt."""
    side = enlarge(next(iter(pairs.values()))[0].picture).width
    width, height = len(names) * (side + GAP) - GAP, ABOVE + side + BELOW
    down = -(-len(pairs) // ACROSS)
    page = Image.new("RGB", (MARGIN + ACROSS * (width + MARGIN), MARGIN + down * (height + MARGIN)), PAPER)
    draw = ImageDraw.Draw(page)
    for index, (text, drawn) in enumerate(pairs.items()):
        left = MARGIN + index % ACROSS * (width + MARGIN)
        top = MARGIN + index // ACROSS * (height + MARGIN)
        bottom = top + ABOVE + side
        for number, (name, one) in enumerate(zip(names, drawn, strict=True)):
            x = left + number * (side + GAP)
            write(draw, x, top, [(f"{name}, {one.seconds:.2f} s", FAINT)], 16)
            page.paste(enlarge(one.picture), (x, top + ABOVE))
            write(draw, x, bottom + 8, [(word, FAINT if right else WRONG) for word, right in one.words], 13)
        write(draw, left, bottom + 34, [(text, INK)], 17)
    return page


if __name__ == "__main__":
    main()
