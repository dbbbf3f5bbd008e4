"""Mixers that keep a model's own projections, once more for inference."""

from __future__ import annotations

from typing import Any

import torch

from .hybrid import HybridMixer, HybridSpec
from .joint import JointMixer, JointSpec


def shared_mixer(source: Any, device: torch.device | None = None) -> HybridMixer | JointMixer:
    """The same mixer once more; its parameters are shared where they are on the device.

    Args:
        source: a HybridMixer or a JointMixer, also one of this package loaded under another name.
        device: of the parameters; None leaves them where they are.
    """
    # A host may run in inference mode. Parameters made there could never be part of a graph trained on top.
    with torch.inference_mode(False), torch.no_grad():
        values = source.spec.to_dict()
        mixer: HybridMixer | JointMixer
        if source.kind == JointMixer.kind:
            mixer = JointMixer(JointSpec.from_dict(values), device="meta")
        else:
            mixer = HybridMixer(HybridSpec.from_dict(values), device="meta")
        own = {
            name: tensor.to(device, copy=tensor.is_inference())
            for name, tensor in source.state_dict().items()
        }
        mixer.load_state_dict(own, assign=True)
        return mixer.requires_grad_(False).eval()
