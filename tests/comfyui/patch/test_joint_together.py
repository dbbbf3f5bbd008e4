"""Joint mixers with the rest of a user's graph: the twin of `test_together`, for models of text and image.

Every case runs the same graph with mixers that have a landmark for each token, and must draw the same as
without; then with others, and must not. The model that went in must draw the same as before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from testing.comfy_joint_models import (
    joint_conditioning,
    make_joint,
    make_joint_mixers,
    sample_joint,
    with_joint,
)
from testing.comfy_models import called
from testing.comfy_patches import Model, compiled, rescale_cfg
from testing.compare import largest_error

EXACT = {"landmarks": 2**14, "kernel_size": 0}
MIXED = {"landmarks": 6, "kernel_size": 3}
Draw = Callable[[Model, str], torch.Tensor]


def as_is(model: Model) -> Model:
    return model


@dataclass
class Case:
    """What is done to the MODEL before and after the mixers, and how it is sampled."""

    before: Callable[[Model], Model] = as_is
    after: Callable[[Model], Model] = as_is
    run: Draw = sample_joint


def lora(model: Model) -> Model:
    """On all layers of attention, as weight patches."""
    clone, weights = model.clone(), model.model_state_dict()
    keys = [key for key in weights if "qkv.weight" in key or "linear1.weight" in key]
    clone.add_patches({key: ("diff", (torch.full_like(weights[key], 0.02),)) for key in keys})
    return clone


def merged(model: Model) -> Model:
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    other = model.clone()
    return called(ModelMergeSimple, "merge", model, lora(other), 0.5)


def sampling(**options: Any) -> Draw:
    return lambda model, name: sample_joint(model, name, **options)


def control() -> Any:
    """What a ControlNet gives a FLUX: something that is added to the image's tokens after blocks."""
    from comfy.controlnet import ControlBase

    class Control(ControlBase):
        def get_control(self, x: torch.Tensor, *_: Any) -> dict[str, list[torch.Tensor]]:
            tokens = -(-x.shape[-2] // 2) * -(-x.shape[-1] // 2)
            add = torch.linspace(-1, 1, tokens * 32).reshape(1, tokens, 32).repeat(len(x), 1, 1)
            return {"input": [add], "output": [add]}

        def copy(self) -> Control:
            return self

        def get_models(self) -> list[Any]:
            return []

    return Control()


def controlled(model: Model, name: str) -> torch.Tensor:
    both = []
    for seed in (1, 5):
        ((text, more),) = joint_conditioning(name, seed)
        both.append([[text, more | {"control": control(), "control_apply_to_uncond": True}]])
    return sample_joint(model, name, positive=both[0], negative=both[1])


def image_to_image(model: Model, name: str) -> torch.Tensor:
    latent = torch.randn(1, 16, 15, 12, generator=torch.Generator().manual_seed(4))
    return sample_joint(model, name, latent=latent, denoise=0.5, steps=4)


def inpainting(model: Model, name: str) -> torch.Tensor:
    latent = torch.randn(1, 16, 16, 12, generator=torch.Generator().manual_seed(4))
    mask = torch.zeros(1, 1, 16, 12)
    mask[..., 3:9, 2:10] = 1
    return sample_joint(model, name, latent=latent, denoise=0.8, mask=mask)


def second_pass(model: Model, name: str) -> torch.Tensor:
    first = sample_joint(model, name, (14, 10))
    larger = torch.nn.functional.interpolate(first, size=(21, 15), mode="bilinear")
    return sample_joint(model, name, latent=larger, denoise=0.5, steps=4)


def areas_and_masks(model: Model, name: str) -> torch.Tensor:
    mask = torch.zeros(1, 18, 16)
    mask[:, 4:14] = 1
    parts = [
        {"area": (9, 16, 0, 0), "strength": 0.8},
        {"area": (11, 5, 7, 11), "strength": 1.0},
        {"mask": mask, "mask_strength": 0.7, "set_area_to_bounds": True},
    ]
    positive = []
    for seed, part in enumerate(parts):
        ((text, more),) = joint_conditioning(name, seed)
        positive.append([text, more | part])
    return sample_joint(model, name, (18, 16), positive=positive)


CASES = {
    "LoRA before": Case(before=lora),
    "LoRA after": Case(after=lora),
    "merged before": Case(before=merged),
    "merged after": Case(after=merged),
    "RescaleCFG after": Case(after=rescale_cfg),
    "torch.compile": Case(after=compiled),
    "ControlNet": Case(run=controlled),
    "image to image": Case(run=image_to_image),
    "inpainting": Case(run=inpainting),
    "second pass at another size": Case(run=second_pass),
    "areas and masks": Case(run=areas_and_masks),
    "odd sizes": Case(run=sampling(size=(17, 23))),
    "a single row": Case(run=sampling(size=(2, 40))),
    "batch of three": Case(run=lambda m, name: sample_joint(m, name, latent=torch.zeros(3, 16, 12, 10))),
    "without guidance": Case(run=sampling(cfg=1.0)),
    "second-order ancestral sampler": Case(run=sampling(sampler="dpmpp_2s_ancestral")),
    "much at once": Case(before=lora, after=lambda m: rescale_cfg(merged(m)), run=controlled),
}


@pytest.mark.parametrize("family", ["flux", "lumina2"])
@pytest.mark.parametrize("name", CASES)
def test_draws_as_attention_does(pack, family, name):
    case, model = CASES[name], make_joint(family)
    if case.run is controlled and family != "flux":
        pytest.skip("its ControlNets are patches of blocks")
    exact, mixed = (make_joint_mixers(pack, model, **spec) for spec in (EXACT, MIXED))
    untouched = case.run(case.after(case.before(model)), family)
    own = case.run(case.after(with_joint(pack, case.before(model), exact)), family)
    assert largest_error(own, untouched) < 2e-5
    other = case.run(case.after(with_joint(pack, case.before(model), mixed)), family)
    assert largest_error(other, untouched) > 1e-5
    assert torch.equal(case.run(case.after(case.before(model)), family), untouched)


def test_a_deep_clone_for_another_gpu(pack):
    """Where ComfyUI has them (core's MultiGPU CFG Split)."""
    model = make_joint("flux")
    if not hasattr(model, "deepclone_multigpu"):
        pytest.skip("this ComfyUI knows one GPU only")
    model.cached_patcher_init = (lambda disable_dynamic=False: make_joint("flux"), ())
    first = with_joint(pack, model, make_joint_mixers(pack, model, **MIXED))
    expected = sample_joint(first, "flux")
    second = first.deepclone_multigpu(new_load_device=torch.device("cpu", 1))
    assert [m.load_device for m in second.model_patches_models()] == [torch.device("cpu", 1)]
    assert largest_error(sample_joint(second, "flux"), expected) < 1e-5
