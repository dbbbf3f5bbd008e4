"""Many prompts in random order through one real ComfyUI server, and what it holds afterwards.

    python -m benchmarks.soak [--minutes 10] [--only attention] [--seed 0]

Good prompts, prompts that must be refused, cancelled ones, and ones whose network fails on purpose (out of
memory and others) follow each other at random. Every picture of a configuration must be the same, bit for
bit; every failure must be the expected one. In between, ComfyUI frees all models, and the process is looked
at: memory, live tensors, patchers and blocks. Growth per prompt is the slope of a straight line through those
looks but for the first quarter, when caches fill; its error is the standard error. There are two: of what
malloc has handed out ("in use"), which a leak shows in, and of the resident memory, where the free pieces
between what is in use move it up and down in steps of megabytes. Exits with 1 if anything was unexpected.
Linux with glibc only.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.comfy_server import ComfyServer, ServerError
from testing.comfy_prompts import base_prompt, both, branch, node, patch_node, pictures, write_weights
from testing.comfy_servers import server_with

Prompt = dict[str, Any]
SEEDS = (7, 8, 9)
LOOK_EVERY = 20
"""Prompts from one look at the process to the next."""
MEMORY = ("in use", "resident")
FREED = {"unload_models": True, "free_memory": True}


def of_patch(**changes: Any) -> Callable[[int], Prompt]:
    """ΔConv Patch Model alone, sampled for 3 steps."""

    def prompt(seed: int) -> Prompt:
        bare = {id: part for id, part in base_prompt(steps=3).items() if not id.startswith("attention")}
        return bare | {"patched": patch_node(**changes)} | branch("ΔConv", "patched", seed, steps=3)

    return prompt


def through(name: str, **inputs: Any) -> Callable[[int], Prompt]:
    """A node between the model and the sampler."""

    def prompt(seed: int) -> Prompt:
        bare = {id: part for id, part in base_prompt().items() if not id.startswith("attention")}
        changed = node(name, model=["model", 0], **inputs)
        return bare | {"changed": changed} | branch("other", "changed", seed)

    return prompt


def by_socket(seed: int) -> Prompt:
    loaded = node("DeltaConvLoadWeights", weights="small.safetensors")
    return of_patch(weights="auto", deltaconv=["loaded", 0])(seed) | {"loaded": loaded}


def two_weights(seed: int) -> Prompt:
    other = {"other": patch_node(weights="other.safetensors")} | branch("second", "other", seed, steps=3)
    return of_patch()(seed) | other


def locality(seed: int) -> Prompt:
    inputs = {"steps": 2, "looks": 1, "blocks": "all", "seed": seed}
    look = node(
        "DeltaConvLocality", model=["model", 0], positive=["positive", 0], latent=["latent", 0], **inputs
    )
    return base_prompt(seed) | {"locality": look}


def distilled(seed: int) -> Prompt:
    """Two steps of training, and the picture of what they made."""
    inputs = {"layer_steps": 1, "output_steps": 1, "preset": "custom", "training_seed": seed, "save_every": 1}
    bare = {id: part for id, part in base_prompt().items() if not id.startswith("attention")}
    trained = node(
        "DeltaConvDistill",
        model=["model", 0],
        latents=["latent", 0],
        positive=["positive", 0],
        run_name=f"soak_{seed}",
        **inputs,
    )
    return bare | {"trained": trained} | branch("distilled", "trained", seed)


def complete(prompt: Prompt, info: dict[str, Any]) -> Prompt:
    """The prompt with defaults for the inputs that it leaves out, as the server states them."""
    for part in prompt.values():
        for name, (kind, *options) in info[part["class_type"]]["input"].get("required", {}).items():
            first = kind[0] if isinstance(kind, list) else None
            if name not in part["inputs"]:
                part["inputs"][name] = (options[0] if options else {}).get("default", first)
    return prompt


ATTENTION: dict[str, Callable[[int], Prompt]] = {
    "attention": base_prompt,
    "attention, odd size": lambda seed: base_prompt(seed, size=(17, 23)),
    "attention, 4 steps": lambda seed: base_prompt(seed, steps=4),
    "attention, FreeU": through("FreeU", b1=1.1, b2=1.2, s1=0.9, s2=0.2),
}
CONFIGURATIONS = ATTENTION | {
    "ΔConv": of_patch(),
    "ΔConv, first half": of_patch(end_percent=0.5),
    "ΔConv, second half": of_patch(start_percent=0.5),
    "ΔConv, between": of_patch(start_percent=0.3, end_percent=0.7),
    "ΔConv, some blocks": of_patch(blocks="all,-mid"),
    "ΔConv, through the socket": by_socket,
    "two weights": two_weights,
    "attention, then ΔConv": lambda seed: both("attention", seed),
    "ΔConv, then attention": lambda seed: both("ΔConv", seed),
    "neighborhood": through("DeltaConvNeighborhoodAttention", kernel_size=3, blocks="all"),
    "locality": locality,
    "distilled": distilled,
}
REFUSED: dict[str, tuple[Callable[[int], Prompt], str]] = {
    "absent weights": (of_patch(weights="absent.safetensors"), "absent.safetensors"),
    "damaged weights": (of_patch(weights="damaged.safetensors"), "not a whole safetensors file"),
    "no such blocks": (of_patch(blocks="up_blocks.9"), "matches no site"),
    "backward range": (of_patch(start_percent=0.7, end_percent=0.2), "expected 0 <= start_percent"),
    "even window": (
        through("DeltaConvNeighborhoodAttention", kernel_size=4, blocks="all"),
        "odd kernel_size",
    ),
}
FAILING = ("out of memory", "RuntimeError", "MemoryError", "ValueError")


@dataclass
class Soak:
    """What was seen so far."""

    server: ComfyServer
    choose: random.Random
    names: list[str]
    info: dict[str, Any]
    pictures: dict[tuple[str, int], dict[str, bytes]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    looks: list[tuple[int, dict[str, int]]] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    @property
    def prompts(self) -> int:
        return sum(self.counts.values())

    def next(self, mixed: bool) -> None:
        """A prompt of a kind chosen at random."""
        kind = self.choose.choices(("good", "refused", "cancelled", "failing"), (70, 10, 10, 10))[0]
        self.one(kind if mixed else "good", self.choose.choice(self.names), self.choose.choice(SEEDS))

    def one(self, kind: str, name: str, seed: int) -> None:
        self.counts[kind] += 1
        try:
            if kind == "refused":
                self.refused()
            elif kind == "failing":
                self.failing(name, seed)
            elif kind == "cancelled":
                self.cancelled(name, seed)
            else:
                self.good(name, seed)
        except (ServerError, OSError) as error:
            self.unexpected.append(f"{kind} {name}: {str(error)[-300:]}")

    def prompt(self, name: str, seed: int) -> Prompt:
        return complete(CONFIGURATIONS[name](seed), self.info)

    def good(self, name: str, seed: int) -> None:
        self.compare(name, seed, self.server.queue(self.prompt(name, seed)))

    def compare(self, name: str, seed: int, history: dict[str, Any]) -> None:
        """The pictures of a prompt with those of the first of its kind."""
        if said := self.server.failure(history):
            self.unexpected.append(f"{name}: {said[:300]}")
            return
        seen = pictures(self.server, history["outputs"])
        if self.pictures.setdefault((name, seed), seen) != seen:
            self.unexpected.append(f"{name}, seed {seed}: another picture")

    def refused(self) -> None:
        name = self.choose.choice(sorted(REFUSED))
        prompt, words = REFUSED[name]
        try:
            said = self.server.failure(self.server.queue(prompt(7)))
        except ServerError as error:
            said = f"{error} {error.details}"
        if words not in said:
            self.unexpected.append(f"{name}: {said[:300] or 'was not refused'}")

    def failing(self, name: str, seed: int) -> None:
        """The configuration with an error in the middle of its network, and then without."""
        prompt = self.prompt(name, seed)
        error = self.choose.choice(FAILING)
        for id, part in list(prompt.items()):
            if part["class_type"] == "KSampler":
                inputs = {"error": error, "call": self.choose.randint(1, 8), "once": self.prompts}
                prompt[f"{id} fails"] = node("SoakFail", model=part["inputs"]["model"], **inputs)
                part["inputs"]["model"] = [f"{id} fails", 0]
        said = self.server.failure(self.server.queue(prompt))
        memory = error == "out of memory" and "memory" in said.lower()
        if f"injected: {error}" not in said and not memory:
            self.unexpected.append(f"{name} with {error}: {said[:300] or 'did not fail'}")

    def cancelled(self, name: str, seed: int) -> None:
        """Interrupted at one of its messages; one that was faster than that is compared."""
        at = self.choose.randint(1, 12)
        seen = 0

        def interrupt(kind: str, data: dict[str, Any]) -> None:
            nonlocal seen
            seen += 1
            if seen == at:
                self.server.interrupt()

        history = self.server.queue(self.prompt(name, seed), interrupt)
        said = self.server.failure(history)
        if not said:
            self.compare(name, seed, history)
        elif said != "interrupted":
            self.unexpected.append(f"{name}, cancelled: {said[:300]}")

    def look(self) -> None:
        """At the process, after ComfyUI freed what it can."""
        self.server.post("/history", {"clear": True})
        self.server.post("/free", FREED)
        for _ in range(10):
            time.sleep(0.5)  # it frees when its queue is next looked at
            seen = self.server.get("/soak")
            if not seen["ModelPatcher"]:
                break
        else:
            self.unexpected.append(
                f"after {self.prompts} prompts: {seen['ModelPatcher']} ModelPatchers live on"
            )
        self.looks.append((self.prompts, seen))


def slope(points: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """(slope, its standard error) of a straight line through points, at least 3."""
    xs, ys = zip(*points, strict=True)
    line = statistics.linear_regression(xs, ys)
    left = [y - line.slope * x - line.intercept for x, y in zip(xs, ys, strict=True)]
    spread = sum((x - statistics.fmean(xs)) ** 2 for x in xs)
    return line.slope, (sum(d * d for d in left) / (len(xs) - 2) / spread) ** 0.5


def main() -> int:
    command = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument("--minutes", type=float, default=10.0, help="how long (%(default)g)")
    command.add_argument(
        "--only", choices=["attention"], help="attention alone and no failures, to compare with"
    )
    command.add_argument("--seed", type=int, default=0, help="of the order (%(default)d)")
    args = command.parse_args()
    names = list(ATTENTION if args.only else CONFIGURATIONS)
    with tempfile.TemporaryDirectory() as folder, server_with("soak_nodes", Path(folder)) as server:
        weights = server.base / "models" / "deltaconv"
        write_weights(weights / "small.safetensors")
        whole = write_weights(weights / "other.safetensors", seed=1).read_bytes()
        (weights / "damaged.safetensors").write_bytes(whole[: len(whole) // 2])
        soak = Soak(server, random.Random(args.seed), names, server.object_info())
        for name in names:  # everything once, so that what is made once is made
            soak.one("good", name, SEEDS[0])
        end = time.monotonic() + 60 * args.minutes
        while time.monotonic() < end:
            if soak.prompts % LOOK_EVERY == 0:
                soak.look()
            soak.next(mixed=not args.only)
        soak.look()
    report(soak)
    return bool(soak.unexpected)


def report(soak: Soak) -> None:
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(soak.counts.items()))
    print(f"{soak.prompts} prompts ({kinds}), {len(soak.names)} configurations, {len(soak.looks)} looks")
    first, last = soak.looks[0][1], soak.looks[-1][1]
    for name in sorted(first.keys() - set(MEMORY)):
        print(f"  {name}: {first[name]} -> {last[name]}")
    for name in MEMORY:
        points = [(prompts, seen[name]) for prompts, seen in soak.looks[len(soak.looks) // 4 :]]
        if len(points) > 2:
            grown, error = slope(points)
            per_prompt = f"{grown / 1024:.2f} ± {error / 1024:.2f} KB a prompt"
            print(f"  memory {name}: {per_prompt}, {last[name] >> 20} MB at the end")
    print(f"{len(soak.unexpected)} unexpected")
    for line in soak.unexpected:
        print(f"  {line}")


if __name__ == "__main__":
    sys.exit(main())
