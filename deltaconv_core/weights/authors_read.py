"""The authors' files: tensors named after the model's modules, in several forms of the block.

A block's keys are `<path>.transformer_blocks.<n>.conv1.<name>` (PixArt: without a path). The forms are told
apart by names and shapes:
- current: Linear projections, depth-wise kernels [K, K, channels];
- plain twin: projections as 1x1 convolutions [out, in, 1, 1], kernels [channels, 1, K, K];
- earlier block: exactly two stages `conv_spatial` and `conv_spatial_low`, bilinear pooling, sigmoid gate.
Biases of any layer may be absent. What tensors cannot show (gate, scales, pooling) comes from the caller,
else from texts of those names in the file's header, else it is what the authors use for that architecture.
Source: the authors' repositories IrisRainbowNeko/ConvFusion and IrisRainbowNeko/PyramidConvBlock, facts only.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, astuple
from typing import NamedTuple

from torch import Tensor

from ..block.spec import BlockSpec, ratio_of
from ..errors import CheckpointError, DeltaConvError
from ..sites import ARCHITECTURES, authors_gate, identify, site_channels
from ..util.foreign_json import parse_json
from ..util.text import listing, quoted
from .manifest import SpecHints

PREFIXES = ("denoiser.", "unet.", "base:", "base_ema:")
ANY_PREFIXES = re.compile(rf"(?:{'|'.join(map(re.escape, PREFIXES))})*")
BLOCK_KEY = re.compile(
    r"((?:.+\.)?transformer_blocks\.\d+)\.conv1\."
    r"((?:conv_up|conv_out|conv_pool|conv_spatial|conv_spatial_low|gates\.\d+\.conv_spatial)\.(?:weight|bias))"
)
BASE_KEY = re.compile(r"(?:.+\.)?resnets\.\d+\.conv1\.(?:weight|bias)")
EXPECTED_KEYS = (
    "[…]transformer_blocks.<n>.conv1.{conv_up, conv_out, conv_pool, gates.<i>.conv_spatial, conv_spatial, "
    "conv_spatial_low}.{weight, bias} or […]resnets.<n>.conv1.{weight, bias}"
)
EARLIER_STAGES = {"conv_spatial.": "gates.0.conv_spatial.", "conv_spatial_low.": "gates.1.conv_spatial."}
# The authors' only example with three stages. Their paper's formula (1 / 2^i) would make the last one 1/4.
USUAL_SCALES = {1: (1.0,), 2: (1.0, 0.5), 3: (1.0, 0.5, 1 / 3)}

log = logging.getLogger(__name__)


class Parts(NamedTuple):
    """The authors' file in this package's own terms; tensors are named `<site id>.<parameter>`."""

    architecture: str
    specs: dict[str, BlockSpec]
    tensors: dict[str, Tensor]
    base_weights: dict[str, Tensor]
    metadata: dict[str, str]


def read_authors(
    path: str, header: Mapping[str, str], tensors: Mapping[str, Tensor], hints: SpecHints
) -> Parts:
    """Sorts and renames the tensors of a file of the authors' and finds out the specs.

    Args:
        path: for messages.
        header: texts of the file's header.
        tensors: as named in the file.
        hints: what the caller knows; wins over the header.

    Raises:
        CheckpointError: keys or shapes of none of the known forms, sites of a known architecture missing, or
            settings that do not fit; named, with what was expected.
    """
    blocks, base_weights = _sorted_keys(path, _without_prefixes(path, tensors))
    _add_absent_biases(path, blocks)
    hints = _first_known(hints, _from_header(path, header))
    specs: dict[str, BlockSpec] = {}
    renamed: dict[str, Tensor] = {}
    for site in sorted(blocks, key=lambda s: re.sub(r"\d+", lambda number: number[0].zfill(9), s)):
        specs[site], own = _read_block(path, site, blocks[site], hints)
        renamed |= {f"{site}.{name}": tensor for name, tensor in own.items()}
    metadata = {key: text for key, text in header.items() if key != "format"}
    if hints.scales is None and any(len(spec.scales) > 2 for spec in specs.values()):
        metadata["assumed"] = _warn_of_scales(path)
    return Parts(_architecture(path, specs), specs, renamed, base_weights, metadata)


def _without_prefixes(path: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = ANY_PREFIXES.sub("", key, count=1)
        if name in named:
            raise CheckpointError(
                f"{path} holds {name} more than once, under different prefixes ({', '.join(PREFIXES)}); "
                "keep one set of weights in the file"
            )
        named[name] = tensor
    return named


def _sorted_keys(
    path: str, named: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors of every site, and the ResNets' first convolutions; anything else is refused."""
    blocks: dict[str, dict[str, Tensor]] = {}
    base_weights, unknown = {}, []
    for name, tensor in named.items():
        if match := BLOCK_KEY.fullmatch(name):
            blocks.setdefault(f"{match[1]}.attn1", {})[match[2]] = tensor
        elif BASE_KEY.fullmatch(name):
            base_weights[name] = _checked_base_weight(path, name, tensor)
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(
            f"{path} holds {len(unknown)} tensors that no known form of the block has: {listing(unknown)}; "
            f"expected {EXPECTED_KEYS}; choose another file"
        )
    if not blocks:
        raise CheckpointError(f"{path} holds no block; expected {EXPECTED_KEYS}; choose another file")
    return blocks, base_weights


def _checked_base_weight(path: str, name: str, tensor: Tensor) -> Tensor:
    shape = tuple(tensor.shape)
    if len(shape) != 1 if name.endswith(".bias") else len(shape) != 4 or shape[2:] != (3, 3):
        expected = "(channels,)" if name.endswith(".bias") else "(channels out, channels in, 3, 3)"
        raise CheckpointError(f"{path}: {name} has shape {shape}, expected {expected}; get the file again")
    return tensor


def _add_absent_biases(path: str, blocks: Mapping[str, dict[str, Tensor]]) -> None:
    """A projection without bias is one whose bias is zero; but all blocks of a file are alike."""
    for layer in ("conv_up", "conv_out", "conv_pool"):
        without = [site for site, named in blocks.items() if f"{layer}.bias" not in named]
        if without and len(without) < len(blocks):
            raise CheckpointError(
                f"{path}: {layer}.bias is missing at {listing(without)} but not at other blocks; "
                "the file is damaged: get it again"
            )
        for site in without:
            if (weight := blocks[site].get(f"{layer}.weight")) is not None:
                blocks[site][f"{layer}.bias"] = weight.new_zeros(weight.shape[:1])


def _from_header(path: str, header: Mapping[str, str]) -> SpecHints:
    scales = None
    if "scales" in header:
        try:
            scales = tuple(parse_json(header["scales"]))
        except (ValueError, TypeError):
            raise CheckpointError(
                f"{path}: expected scales in its header like [1, 0.5], got {quoted(header['scales'])}; "
                "get the file again"
            ) from None
    return SpecHints(header.get("gate"), scales, header.get("pooling"))


def _first_known(hints: SpecHints, other: SpecHints) -> SpecHints:
    return SpecHints(*(b if a is None else a for a, b in zip(astuple(hints), astuple(other), strict=True)))


def _read_block(
    path: str, site: str, named: Mapping[str, Tensor], hints: SpecHints
) -> tuple[BlockSpec, dict[str, Tensor]]:
    """The spec of one block, and its tensors named and laid out as in `DeltaConvBlock`."""
    earlier = any(name.startswith("conv_spatial") for name in named)
    if earlier and any(name.startswith("gates.") for name in named):
        raise CheckpointError(
            f"{path}: the block at {site} is of two forms at once: {listing(named)}; "
            "keep those of one form in the file"
        )
    named = {_own_name(name): tensor for name, tensor in named.items()}
    stages = [name for name in named if re.fullmatch(r"gates\.\d+\.conv_spatial\.weight", name)]
    if "conv_up.weight" not in named or not stages:
        raise CheckpointError(
            f"{path}: the block at {site} has no conv_up.weight or no depth-wise kernel, only "
            f"{listing(named)}; get the file again"
        )
    own = {name: _projection(path, site, name, t) for name, t in named.items() if name.startswith("conv_")}
    inter = own["conv_up.weight"].shape[0]
    for name, tensor in named.items():
        if name not in own:
            own[name] = _kernel(path, site, name, tensor, inter) if name.endswith(".weight") else tensor
    usual = SpecHints(
        gate="sigmoid" if earlier else authors_gate(site),
        scales=USUAL_SCALES.get(len(stages)),
        pooling="bilinear" if earlier else "average",
    )
    return _spec(path, site, own, len(stages), _first_known(hints, usual)), own


def _spec(path: str, site: str, own: Mapping[str, Tensor], stages: int, hints: SpecHints) -> BlockSpec:
    if hints.scales is None or len(hints.scales) != stages:
        raise CheckpointError(
            f"{path}: the block at {site} has {stages} stages and needs as many scales, got "
            f"{quoted(hints.scales)}; give them (scales=..., or --scales of the convert command)"
        )
    inter, dim = own["conv_up.weight"].shape
    kernel = next(tensor for name, tensor in own.items() if name.endswith("conv_spatial.weight"))
    try:
        return BlockSpec(
            dim=dim,
            kernel_size=kernel.shape[-1],
            depthwise_bias=any(name.endswith("conv_spatial.bias") for name in own),
            ratio=ratio_of(inter, dim),
            **{key: value for key, value in asdict(hints).items() if value is not None},
        )
    except DeltaConvError as error:
        raise CheckpointError(f"{path}: the block at {site} is impossible: {error}") from error


def _own_name(name: str) -> str:
    for old, new in EARLIER_STAGES.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _projection(path: str, site: str, name: str, tensor: Tensor) -> Tensor:
    """[out, in] from itself or from a 1x1 convolution's [out, in, 1, 1]; biases as they are."""
    shape = tuple(tensor.shape)
    if name.endswith(".weight") and (len(shape) not in (2, 4) or shape[2:] not in ((), (1, 1))):
        raise CheckpointError(
            f"{path}: {name} of the block at {site} has shape {shape}, expected (out, in) or (out, in, 1, "
            "1); get the file again"
        )
    return tensor.flatten(1) if len(shape) == 4 else tensor


def _kernel(path: str, site: str, name: str, tensor: Tensor, channels: int) -> Tensor:
    """[channels, 1, K, K] from itself or from the authors' current [K, K, channels]."""
    shape = tuple(tensor.shape)
    if len(shape) == 3 and shape == (shape[0], shape[0], channels):
        return tensor.permute(2, 0, 1).unsqueeze(1).contiguous()
    if len(shape) == 4 and shape == (channels, 1, shape[3], shape[3]):
        return tensor
    raise CheckpointError(
        f"{path}: {name} of the block at {site} has shape {shape}, "
        f"expected (K, K, {channels}) or ({channels}, 1, K, K); get the file again"
    )


def _architecture(path: str, specs: Mapping[str, BlockSpec]) -> str:
    channels = {site: spec.dim for site, spec in specs.items()}
    name = identify(channels)
    for known in () if name in ARCHITECTURES else ARCHITECTURES:
        table = site_channels(known)
        if channels.items() <= table.items():
            raise CheckpointError(
                f"{path} holds {len(channels)} of the {len(table)} blocks of {known}; "
                f"missing: {listing(site for site in table if site not in channels)}; get the file again"
            )
    return name


def _warn_of_scales(path: str) -> str:
    assumed = "scales 1, 1/2, 1/3, as in the authors' example; their paper's formula would give 1, 1/2, 1/4"
    log.warning(
        "%s does not state its three scales; assumed: %s. Give scales to choose others.", path, assumed
    )
    return assumed
