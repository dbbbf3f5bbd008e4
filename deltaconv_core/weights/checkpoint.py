"""Trained blocks of one model, in memory and on disk.

The file is safetensors. The text `deltaconv` in its header is a JSON object: `format` (the version, 1),
`architecture`, `specs` (site id -> `BlockSpec.to_dict()`) and `metadata` (text -> text). Its tensors are
named `blocks.<site id>.<parameter>` and `base_weights.<diffusers parameter name>`. Equal checkpoints make
equal files. A folder as `hub_folder.py` writes it holds such a file and the same description beside it.

Other mixers than ΔConvBlocks have format version 2, which programs that know none refuse by that number. It
says which: `mixer` is "hybrid" or "joint", `specs` are of `HybridSpec` or `JointSpec`, and `kept` (site id ->
text) says why attention stays at the other sites. Of joint mixers, `architecture` is the family that ComfyUI
and diffusers have a class for ("flux", "lumina2", ...), and the text `sizes` in `metadata` the sizes in
tokens that they were fitted to.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..block import DeltaConvBlock
from ..block.spec import BlockSpec
from ..errors import CheckpointError, DeltaConvError
from ..mixers.hybrid import HybridMixer, HybridSpec
from ..mixers.joint import JointMixer, JointSpec
from ..sites import ARCHITECTURES, site_channels
from ..util.foreign_json import parse_json, read_json
from ..util.text import listing, quoted
from .authors_read import read_authors
from .manifest import SpecHints
from .safefile import Pathlike, read_file, write_file

HEADER_KEY = "deltaconv"
FORMAT, MIXER_FORMAT = 1, 2  # of ΔConvBlocks, and of other mixers
DELTACONV_KIND, HYBRID_KIND, JOINT_KIND = DeltaConvBlock.kind, HybridMixer.kind, JointMixer.kind
SPECS: dict[str, type[BlockSpec] | type[HybridSpec] | type[JointSpec]] = {
    DELTACONV_KIND: BlockSpec,
    HYBRID_KIND: HybridSpec,
    JOINT_KIND: JointSpec,
}
BLOCKS_PREFIX = "blocks."
ENOUGH_MISSING = 100  # tensors
BASE_WEIGHTS = "base_weights."
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"  # of a folder
CLASS_NAME = "DeltaConvCheckpoint"


@dataclass(eq=False)
class Checkpoint:
    """Trained blocks and what belongs to them.

    Args:
        architecture: "sd15", "sdxl", ... or a name made of the model's shape (`sites.identify`).
        blocks: site id -> DeltaConvBlock, HybridMixer or JointMixer; all of one kind.
        base_weights: diffusers parameter name -> tensor, weights of the base model that came with them.
        metadata: teacher, training settings, license, source; all text.
        kept: of other mixers than ΔConvBlocks: site id -> why the attention stays there.
    """

    architecture: str
    blocks: dict[str, Any]
    base_weights: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    @property
    def mixer(self) -> str:
        """What the blocks are: "deltaconv", "hybrid" or "joint"."""
        return next((str(block.kind) for block in self.blocks.values()), DELTACONV_KIND)


def check_deltaconv(checkpoint: Any, doing: str) -> None:
    """Refuses blocks that are not ΔConvBlocks.

    Args:
        checkpoint: a Checkpoint.
        doing: what works on ΔConvBlocks alone, as the beginning of a sentence.

    Raises:
        DeltaConvError: other mixers.
    """
    if checkpoint.mixer != DELTACONV_KIND:
        raise DeltaConvError(
            f"{doing} works on ΔConvBlocks; these weights are {checkpoint.mixer} mixers, which keep the "
            "model's own projections"
        )


def save_checkpoint(checkpoint: Checkpoint, path: Pathlike) -> None:
    """Writes a checkpoint, each tensor in its own dtype; a kill leaves the old file or the new one.

    Raises:
        CheckpointError: a checkpoint that `load_checkpoint` would refuse, or a place that cannot be written.
    """
    _check_kept(str(path), checkpoint)
    check_sites(str(path), checkpoint.architecture, {s: block.spec for s, block in checkpoint.blocks.items()})
    _check_texts(str(path), "metadata", checkpoint.metadata)
    tensors = {
        f"{BLOCKS_PREFIX}{site}.{name}": tensor
        for site, block in checkpoint.blocks.items()
        for name, tensor in block.state_dict().items()
    }
    tensors |= {f"{BASE_WEIGHTS}{name}": tensor for name, tensor in checkpoint.base_weights.items()}
    write_file(path, tensors, {HEADER_KEY: json.dumps(header_of(checkpoint))})


def header_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """All of a checkpoint but its tensors, as plain values for JSON."""
    described = {
        "format": FORMAT,
        "architecture": checkpoint.architecture,
        "specs": {site: block.spec.to_dict() for site, block in checkpoint.blocks.items()},
        "metadata": checkpoint.metadata,
    }
    if checkpoint.mixer == DELTACONV_KIND:
        return described
    return described | {"format": MIXER_FORMAT, "mixer": checkpoint.mixer, "kept": checkpoint.kept}


def load_checkpoint(
    path: Pathlike,
    *,
    gate: str | None = None,
    scales: Sequence[float] | None = None,
    pooling: str | None = None,
) -> Checkpoint:
    """Reads a checkpoint: this package's own file or folder, or any form of the authors' (`authors_read.py`).

    Only safetensors files are ever opened.

    Args:
        path: the file, or the folder.
        gate, scales, pooling: what every block of the file is to have, where the file does not say or says it
            wrong; None takes the file's word, and for the authors' files what they use for the architecture.

    Raises:
        CheckpointError: no such file; not a whole safetensors file; another format or format version; NaN or
            infinite weights; keys or shapes that do not follow from the specs, or are of no known form.
    """
    return read_checkpoint(path, SpecHints(gate, None if scales is None else tuple(scales), pooling))


def read_checkpoint(path: Pathlike, hints: SpecHints) -> Checkpoint:
    """`load_checkpoint` for callers that have the hints together, as a record of the manifest has them."""
    folder = Path(path)
    is_folder = os.path.isdir(folder)
    if is_folder:
        path = folder / WEIGHTS
    header, tensors = read_file(path)
    if is_folder:
        _check_config(folder, header)
    if HEADER_KEY in header:
        return _from_own_form(str(path), header[HEADER_KEY], tensors, hints)
    parts = read_authors(str(path), header, tensors, hints)
    blocks = assemble_blocks(str(path), parts.specs, parts.tensors)
    return Checkpoint(parts.architecture, blocks, parts.base_weights, parts.metadata)


def assemble_blocks(path: str, specs: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Blocks, or other mixers, from their specs and tensors named `<site id>.<parameter>`.

    The tensors are used as they are.

    Raises:
        CheckpointError: missing or extra tensors, or shapes other than the specs ask for.
    """
    blocks: dict[str, Any] = {}
    expected: dict[str, Tensor] = {}
    missing: list[str] = []
    for site, spec in specs.items():
        block = _made_of(spec)(spec, device="meta")
        named = {f"{site}.{name}": parameter for name, parameter in block.state_dict().items()}
        missing += [name for name in named if name not in tensors]
        if len(missing) > ENOUGH_MISSING:  # a header may describe more blocks than memory holds
            break
        blocks[site] = block
        expected |= named
    extra = [name for name in tensors if name not in expected] if len(blocks) == len(specs) else []
    if missing or extra:
        raise CheckpointError(
            f"{path}: the blocks lack {listing(sorted(missing))} and have unknown {listing(sorted(extra))}; "
            "the file is incomplete or its header belongs to other weights; get the file again"
        )
    for key, parameter in expected.items():
        if tensors[key].shape != parameter.shape:
            raise CheckpointError(
                f"{path}: {key} has shape {tuple(tensors[key].shape)}, expected {tuple(parameter.shape)}; "
                "get the file again"
            )
    for site, block in blocks.items():
        block.load_state_dict({name: tensors[f"{site}.{name}"] for name in block.state_dict()}, assign=True)
    return blocks


def _made_of(spec: Any) -> type[DeltaConvBlock] | type[HybridMixer] | type[JointMixer]:
    """What a spec is of, also one of this package loaded under another name."""
    if hasattr(spec, "nystrom"):
        return HybridMixer
    return JointMixer if hasattr(spec, "landmarks") else DeltaConvBlock


def check_sites(path: str, architecture: str, specs: Mapping[str, Any]) -> None:
    """Checks that there are blocks, and that a known architecture has their sites with their channels.

    Raises:
        CheckpointError: otherwise.
    """
    if not architecture or not isinstance(architecture, str):
        raise CheckpointError(f"{path}: expected the name of an architecture, got {quoted(architecture)}")
    if not specs:
        raise CheckpointError(
            f"{path}: the checkpoint holds no block, expected at least one; a conversion that leaves all "
            "attention has none: convert at a larger size, or allow larger errors"
        )
    if architecture not in ARCHITECTURES:
        return
    channels = site_channels(architecture)
    for site, spec in specs.items():
        if channels.get(site) != spec.dim:
            has = f"{channels[site]} channels there" if site in channels else "no such site"
            raise CheckpointError(
                f"{path}: a block of {spec.dim} channels at {site}, but {architecture} has {has}; "
                "the file names the wrong architecture or is damaged; get it again"
            )


def _from_own_form(path: str, text: str, tensors: Mapping[str, Tensor], hints: SpecHints) -> Checkpoint:
    description = _read_description(path, text)
    architecture = description.get("architecture", "")
    mixer = description.get("mixer", DELTACONV_KIND)
    specs = _read_specs(path, mixer, _object(path, description, "specs"), hints)
    metadata = _object(path, description, "metadata")
    _check_texts(path, "metadata", metadata)
    kept = {} if mixer == DELTACONV_KIND else _object(path, description, "kept")
    check_sites(path, architecture, specs)
    unknown = [key for key in tensors if not key.startswith((BLOCKS_PREFIX, BASE_WEIGHTS))]
    if unknown:
        raise CheckpointError(
            f"{path}: unknown tensors {listing(unknown)}, expected {BLOCKS_PREFIX}* and {BASE_WEIGHTS}*; "
            "get the file again"
        )
    blocks = assemble_blocks(path, specs, _with_prefix(tensors, BLOCKS_PREFIX))
    checkpoint = Checkpoint(architecture, blocks, _with_prefix(tensors, BASE_WEIGHTS), metadata, kept)
    _check_kept(path, checkpoint)
    return checkpoint


def _check_kept(path: str, checkpoint: Checkpoint) -> None:
    """Checks that all blocks are of one kind, and what is said of the sites without one."""
    kinds = sorted({str(block.kind) for block in checkpoint.blocks.values()})
    if len(kinds) > 1:
        raise CheckpointError(
            f"{path}: expected mixers of one kind, got {' and '.join(kinds)}; keep each kind in a file of "
            "its own"
        )
    _check_texts(path, "kept", checkpoint.kept)
    both = [site for site in checkpoint.kept if site in checkpoint.blocks]
    if both or (checkpoint.kept and checkpoint.mixer == DELTACONV_KIND):
        raise CheckpointError(
            f"{path}: attention cannot stay at {listing(both or checkpoint.kept)}: a block stands there, or "
            "the file is of ΔConvBlocks, which says nothing of other sites; get the file again"
        )


def _check_config(folder: Path, header: Mapping[str, str]) -> None:
    """Checks that a folder's config says what the header of its weights says."""
    try:
        config = read_json(folder / CONFIG)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} has no readable {CONFIG} ({error}); get the folder again") from error
    own = _read_description(str(folder / WEIGHTS), header.get(HEADER_KEY, "null"))
    if config != {"_class_name": CLASS_NAME} | own:
        raise CheckpointError(
            f"{folder}: {CONFIG} and the header of {WEIGHTS} do not say the same; get both from one place, "
            f"or convert {WEIGHTS} to a new folder"
        )


def _read_description(path: str, text: str) -> dict[str, Any]:
    try:
        description = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: its header is not JSON ({error}); get the file again") from error
    if not isinstance(description, dict):
        raise CheckpointError(
            f"{path}: expected its header to be an object, got {type(description).__name__}; get the file "
            "again"
        )
    version, mixer = description.get("format"), description.get("mixer", DELTACONV_KIND)
    if version not in (FORMAT, MIXER_FORMAT) or (version == FORMAT) != (mixer == DELTACONV_KIND):
        raise CheckpointError(
            f"{path} has format version {quoted(version)} and mixer {quoted(mixer)}, this program reads "
            f"{FORMAT} with {DELTACONV_KIND!r} and {MIXER_FORMAT} with {HYBRID_KIND!r} or {JOINT_KIND!r}; "
            "update ComfyUI-DeltaConv"
        )
    if not isinstance(mixer, str) or mixer not in SPECS:
        raise CheckpointError(
            f"{path} holds mixers of the kind {quoted(mixer)}, this program knows {', '.join(SPECS)}; update "
            "ComfyUI-DeltaConv"
        )
    return description


def _read_specs(path: str, mixer: str, values: Mapping[str, Any], hints: SpecHints) -> dict[str, Any]:
    specs: dict[str, Any] = {}
    told = {key: value for key, value in asdict(hints).items() if value is not None}
    if told and mixer != DELTACONV_KIND:
        raise CheckpointError(
            f"{path}: {', '.join(told)} can be set for ΔConvBlocks; {mixer} mixers say all of it "
            "themselves, so leave that out"
        )
    for site in values:
        try:
            stored = SPECS[mixer].from_dict(_object(path, values, site))
            if hints.scales is not None and len(hints.scales) != len(stored.scales):
                raise DeltaConvError(
                    f"it has {len(stored.scales)} stages and needs as many scales, got {hints.scales}"
                )
            specs[site] = replace(stored, **told)
        except CheckpointError:
            raise
        except DeltaConvError as error:
            raise CheckpointError(f"{path}: the settings of block {site} are wrong: {error}") from error
    return specs


def _object(path: str, values: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = values.get(key)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected {key} in its header to be an object, got {quoted(value)}")
    return value


def _check_texts(path: str, what: str, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise CheckpointError(f"{path}: expected {what} to be text, got {quoted(key)}: {quoted(value)}")


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
