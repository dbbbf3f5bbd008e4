"""What can stand in for the attention of the demo's NextDiT among the image's tokens, and how it is fitted.

Every kind gets about the same multiply-adds for each of the image's tokens, in units of a head's width: two
for each key that it sees beside the text, and one for each tap of a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from deltaconv_core import Checkpoint
from deltaconv_core.distill.hybrid import FitSettings, Fitted, SeeCall, fit_hybrids
from deltaconv_core.distill.joint_fit import JointFit
from deltaconv_core.mixers.joint import JointLayout, JointMixer, JointSpec
from deltaconv_core.mixers.joint.flops import joint_flops
from deltaconv_core.mixers.joint.module import attention

from .diffusion import alpha_sigma, picture_weight
from .lessons import Lesson, Lessons

MIXERS: dict[str, dict[str, int]] = {
    "hybrid": {"landmarks": 72, "window": 7, "kernel_size": 3},
    "kernels": {"landmarks": 100, "kernel_size": 5},
    "pooled": {"landmarks": 121, "kernel_size": 0},
}
"""Shapes of joint mixers: away from the border of the image they take 251, 225 and 242 of those units."""
WINDOW = 11  # side of the window alone: 242


class Stands(Protocol):
    """Called as (q, k, v, layout) in place of an attention, by head."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layout: JointLayout) -> Tensor: ...


class Teacher:
    """The demo's NextDiT.

    Args:
        path: its file.
    """

    def __init__(self, path: Path) -> None:
        from scripts.comfy_host import import_pack

        self.pack = import_pack().__name__
        # The rotary embeddings of newer versions of ComfyUI have no gradients otherwise.
        import_module("comfy.model_management").in_training = True
        unet = import_module(".nodes.host.demo.unet", self.pack)
        self.model, self.words = unet.load_demo_model(str(path)), unet.load_words(str(path))
        self.device = self.model.load_device
        self.network = self.model.model.requires_grad_(False).eval().to(self.device).diffusion_model
        self.found = import_module(".nodes.host.model.joint", self.pack).find_joint_sites(self.network)
        self.words = self.words.to(self.device)
        self.sites: dict[str, int] = self.found.channels

    def spec(self, site: str, shape: Mapping[str, int]) -> JointSpec:
        """Of a joint mixer at a site."""
        channels, heads = self.found.channels[site], self.found.heads[site]
        return JointSpec(channels, heads, channels // heads, **shape)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Of the tokens of a picture, which are its patches."""
        patch = self.network.patch_size
        return -(-height // patch), -(-width // patch)

    def layout(self, queries: int, grid: tuple[int, int]) -> JointLayout:
        """Of a call with so many queries: the image comes last, filled up to a multiple."""
        image = grid[0] * grid[1]
        padded = image + -image % self.network.pad_tokens_multiple
        return JointLayout(grid, queries - padded)

    def predict(self, lesson: Lesson, override: Any = None) -> Tensor:
        """The pictures that the network sees in a lesson's noise."""
        alpha, sigma = alpha_sigma(lesson.timesteps)
        noisy = alpha * lesson.pictures + sigma * lesson.noise
        context = self.words[lesson.rows]
        options = {} if override is None else {"optimized_attention_override": override}
        picture: Tensor = self.network(
            noisy, lesson.timesteps.float(), context, context.shape[1], transformer_options=options
        )
        return picture

    def lesson(self, lessons: Lessons | Sequence[Lesson], number: int) -> Lesson:
        """On the network's device."""
        return Lesson(*(part.to(self.device) for part in lessons[number]))


class Override:
    """ComfyUI's attention override for one pass of the network, which calls its sites one after another.

    Args:
        teacher: the network.
        grid: of the image's tokens.
        answer: told (site, q, k, v, layout) of every call with an image; None: attention answers.
    """

    def __init__(self, teacher: Teacher, grid: tuple[int, int], answer: Callable[..., Tensor | None]) -> None:
        self.teacher, self.grid, self.answer = teacher, grid, answer
        self.sites = iter(teacher.sites)

    def __call__(self, usual: Any, q: Tensor, k: Tensor, v: Tensor, *others: Any, **more: Any) -> Tensor:
        out = None
        if q.shape[2] >= self.grid[0] * self.grid[1]:  # the text's own layers come first
            site = next(self.sites)
            out = self.answer(site, q, k, v, self.teacher.layout(q.shape[2], self.grid))
        if out is None:
            answered: Tensor = usual(q, k, v, *others, **more)
            return answered
        return out.transpose(1, 2).flatten(2)


def window_attention(q: Tensor, k: Tensor, v: Tensor, layout: JointLayout) -> Tensor:
    """Attention whose image queries see all other tokens, and of the image a window around themselves."""
    tokens, image = k.shape[2], layout.image
    mask = torch.ones(q.shape[2], tokens, dtype=torch.bool, device=q.device)
    mask[image, image] = windows(layout.grid, WINDOW).to(q.device)
    return attention(q, k, v, mask)


@cache
def windows(grid: tuple[int, int], side: int) -> Tensor:
    """(H * W, H * W) bool: which tokens are in a window around each. At the border it is moved inside, so
    that all see as many."""

    def along(length: int) -> Tensor:
        size = min(side, length)
        first = (torch.arange(length) - size // 2).clamp(0, length - size)
        distance = torch.arange(length)[None] - first[:, None]
        return (distance >= 0) & (distance < size)

    rows, columns = along(grid[0]), along(grid[1])
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(0, 1).flatten(1)


def gflop(teacher: Teacher, stands: Mapping[str, Any], grid: tuple[int, int], whole: float) -> float:
    """Of a pass, by that of the teacher, ``whole``: two for each multiply-add. Of windows, what is seen
    counts; a mixer computes more of it, behind masks (`joint_flops`)."""
    image, text = grid[0] * grid[1], 6
    text += -text % teacher.network.pad_tokens_multiple
    padding = -image % teacher.network.pad_tokens_multiple
    change = 0.0
    for site, stand in stands.items():
        exact = padding + (text if site.startswith("layers") else 0)
        inner = teacher.sites[site]
        if isinstance(stand, JointMixer):
            taken = joint_flops(replace(stand.spec, window=0), grid, exact)
            taken += 4 * inner * image * stand.spec.window**2
        else:
            seen = min(WINDOW, grid[0]) * min(WINDOW, grid[1])
            taken = 4 * inner * (exact * (image + exact) + image * (exact + seen))
        change += taken - joint_flops(None, grid, exact, inner)
    return whole + change / 1e9


def fit(teacher: Teacher, lessons: Lessons, count: int) -> dict[str, dict[str, Fitted]]:
    """Every shape of `MIXERS` at every site, fitted to attention in one pass over noisy drawings: name ->
    site -> mixer."""
    candidates = {s: [teacher.spec(s, shape) for shape in MIXERS.values()] for s in teacher.sites}
    seeing: list[SeeCall] = []

    @contextmanager
    def watched(see: SeeCall) -> Iterator[None]:
        seeing[:] = [see]
        yield

    def sample(number: int) -> None:
        lesson = teacher.lesson(lessons, number)

        def told(site: str, q: Tensor, k: Tensor, v: Tensor, layout: JointLayout) -> None:
            seeing[0](site, q, k, v, layout, None)  # type: ignore[arg-type]

        with torch.no_grad():
            teacher.predict(lesson, Override(teacher, teacher.grid(*lesson.pictures.shape[2:]), told))  # type: ignore[arg-type]

    fitted = fit_hybrids(JointFit(candidates, FitSettings()), watched, sample, count)
    return {name: {site: both[n] for site, both in fitted.items()} for n, name in enumerate(MIXERS)}


def train(
    teacher: Teacher,
    mixers: Mapping[str, JointMixer],
    lessons: Lessons | Sequence[Lesson],
    steps: int,
    rate: float,
) -> list[float]:
    """Train kernels and gains so that the network predicts what the teacher predicts; returns the losses.

    Adam, whose rate falls along a straight line.
    """
    parameters = [p for mixer in mixers.values() for p in mixer.requires_grad_(True).parameters()]
    optimizer, losses = torch.optim.Adam(parameters, rate, betas=(0.9, 0.99)), []
    for step in range(steps):
        lesson = teacher.lesson(lessons, step)
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        with torch.no_grad():
            wanted = teacher.predict(lesson)
        loss = distance(teacher, mixers, lesson, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for mixer in mixers.values():
        mixer.requires_grad_(False)
    return losses


def distance(teacher: Teacher, stands: Mapping[str, Stands], lesson: Lesson, wanted: Tensor) -> Tensor:
    """The weighted squared error of the pictures predicted with ``stands`` to those ``wanted``."""
    override = Override(teacher, teacher.grid(*lesson.pictures.shape[2:]), answers(stands))
    weights = picture_weight(lesson.timesteps).view(-1, 1, 1, 1)
    return (weights * (teacher.predict(lesson, override) - wanted).square()).mean()


def answers(stands: Mapping[str, Stands]) -> Callable[..., Tensor]:
    """For an `Override`."""
    return lambda site, q, k, v, layout: stands[site](q, k, v, layout)


def put(teacher: Teacher, stands: Mapping[str, Stands]) -> Any:
    """A clone of the MODEL in which they stand."""
    clone = teacher.model.clone()
    wrappers = import_module("comfy.patcher_extension").WrappersMP

    def wrapper(executor: Any, x: Tensor, *args: Any, **call: Any) -> Tensor:
        override = Override(teacher, teacher.grid(*x.shape[2:]), answers(stands))
        options = call.get("transformer_options", {}) | {"optimized_attention_override": override}
        out: Tensor = executor(x, *args, **call | {"transformer_options": options})
        return out

    clone.add_wrapper(wrappers.DIFFUSION_MODEL, wrapper)
    return clone


def checkpoint(teacher: Teacher, mixers: Mapping[str, JointMixer], metadata: Mapping[str, str]) -> Checkpoint:
    """Weights that ΔConv Patch Model takes."""
    return Checkpoint(teacher.found.architecture, dict(mixers), metadata=dict(metadata))
