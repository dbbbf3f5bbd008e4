"""Students of the demo model: linear attention made, saved and read, and any student put on the MODEL.

ΔConv students are files of `deltaconv_core.save_checkpoint`. Linear attention is a safetensors file too: its
header says ``mixer: linear`` and, as JSON, the heads of every site; tensors are named
``<site id>.<parameter>``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from deltaconv_core import CheckpointError, load_checkpoint
from deltaconv_core.mixers.linear_attention import LinearAttention
from deltaconv_core.weights.safefile import read_file, write_file

KIND = "linear"


def linear_mixers(sites: Mapping[str, Any], network: torch.nn.Module) -> dict[str, LinearAttention]:
    """Linear attention for every site, started from the attention there.

    ``sites`` are those of ``nodes.host.model.sites.find_sites``, ``network`` ComfyUI's BaseModel, which they
    name paths in.
    """
    mixers = {}
    for site_id, site in sites.items():
        attention = network.get_submodule(site.path)
        layers = (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0])
        mixers[site_id] = LinearAttention.from_attention(*layers, heads=attention.heads)
    return mixers


def save_linear(
    mixers: Mapping[str, LinearAttention], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write linear attention, every tensor in its own dtype, with texts about it for the header."""
    tensors = {
        f"{site_id}.{name}": tensor
        for site_id, mixer in mixers.items()
        for name, tensor in mixer.state_dict().items()
    }
    heads = json.dumps({site_id: mixer.heads for site_id, mixer in mixers.items()})
    write_file(path, tensors, {**(metadata or {}), "mixer": KIND, "heads": heads})


def load_linear(path: Path) -> dict[str, LinearAttention]:
    """Read what `save_linear` wrote, as float32.

    Raises ``CheckpointError`` for another kind of file, and for tensors that are missing, unknown or of
    another shape.
    """
    header, tensors = read_file(path)
    if header.get("mixer") != KIND:
        raise CheckpointError(f"{path}: expected a file of linear attention, its header says {header}")
    mixers = {}
    try:
        for site_id, heads in json.loads(header["heads"]).items():
            prefix = f"{site_id}."
            weights = {name: tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
            weights = {name.removeprefix(prefix): tensor.float() for name, tensor in weights.items()}
            inner, dim = weights["to_q.weight"].shape
            mixers[site_id] = LinearAttention(dim, heads, inner, bias="to_q.bias" in weights)
            mixers[site_id].load_state_dict(weights)
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: its tensors and its header do not fit together: {error}") from error
    if tensors:
        raise CheckpointError(f"{path}: tensors of no site: {', '.join(sorted(tensors))}")
    return mixers


def is_linear(path: Path) -> bool:
    """Whether the safetensors file holds linear attention, from its header."""
    return read_header(path)[0].get("mixer") == KIND


def count_weights(path: Path) -> int:
    """Number of weights of the student in a file, weights of its base model left out."""
    shapes = read_header(path)[1]
    return sum(math.prod(shape) for name, shape in shapes.items() if not name.startswith("base_weights."))


def read_header(path: Path) -> tuple[dict[str, str], dict[str, list[int]]]:
    """Texts and the shapes of the tensors of a safetensors file; ``CheckpointError`` when it is none."""
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, shapes
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file ({error})") from error


def put_linear(model: Any, mixers: Mapping[str, LinearAttention], pack: str) -> Any:
    """A clone of the MODEL in which the mixers stand at their sites.

    ``pack`` is the name that this repository is loaded under (``scripts.comfy_host.import_pack``). Raises
    ``CheckpointError`` when the mixers' sites are not those of the MODEL.
    """
    forwards = import_module(".nodes.host.patch.forwards", pack)
    sites = import_module(".nodes.host.model.sites", pack).find_sites(model)
    if mixers.keys() != sites.sites.keys() or any(
        mixer.dim != sites.channels[site_id] for site_id, mixer in mixers.items()
    ):
        made_for = {site_id: mixer.dim for site_id, mixer in mixers.items()}
        raise CheckpointError(f"linear attention for the sites {made_for}, the MODEL has {sites.channels}")
    clone = model.clone()
    for site_id, mixer in mixers.items():
        site = sites.sites[site_id]
        clone.add_object_patch(
            f"{site.path}.forward", forwards.MixerForward(site, mixer.eval().to(clone.load_device))
        )
    return clone


def put_student(model: Any, path: Path, pack: str) -> Any:
    """A clone of the MODEL with the student in the file ``path``; ``pack`` as for `put_linear`."""
    if is_linear(path):
        return put_linear(model, load_linear(path), pack)
    apply = import_module(".nodes.host.patch.apply", pack)
    switch = import_module(".deltaconv_core.sites.sampling_range", pack)
    found = import_module(".nodes.host.model.sites", pack).find_sites(model)
    checkpoint = load_checkpoint(path)
    settings = apply.PatchSettings(",".join(checkpoint.blocks), switch.SamplingRange(), None)
    return apply.apply_checkpoint(model, found, checkpoint, settings)[0]
