"""What is tried: for each kind, one input made by a random generator and given to the code that reads it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save as to_bytes

from deltaconv_core import BlockSpec, Checkpoint, DeltaConvBlock, load_checkpoint
from deltaconv_core.block.ops import fastest
from deltaconv_core.commands import inspect
from deltaconv_core.commands.writable import check_file, check_folder
from deltaconv_core.diffusers.distill.parse import read_options
from deltaconv_core.diffusers.distill.pictures import find_pictures, open_picture
from deltaconv_core.distill import RunFolder
from deltaconv_core.distill.hybrid import FIT_KEY, FitSettings, HybridFit
from deltaconv_core.distill.hybrid_sums import named_sums
from deltaconv_core.distill.run_folder import COLUMNS, RUN_KEY
from deltaconv_core.errors import DeltaConvError
from deltaconv_core.locality.recommend import Recommendation
from deltaconv_core.mixers.hybrid import HybridMixer, HybridSpec
from deltaconv_core.sites import select, site_channels
from deltaconv_core.sites.choose_specs import ModelShape, block_specs
from deltaconv_core.util.free_path import free_path
from deltaconv_core.weights.checkpoint import header_of
from deltaconv_core.weights.fetch.address import check_address
from deltaconv_core.weights.manifest import REPOSITORY, load_manifest
from deltaconv_core.weights.model_card import model_card
from deltaconv_core.weights.safefile import read_file, read_header

from . import mutate

Reader = Callable[[Random, Path], object]
SITE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
SHAPE = ModelShape("sd15", site_channels("sd15"), 4)


def headers(random: Random, folder: Path) -> object:
    """Weights files: our own form, of blocks and of hybrid mixers, and the authors', with a changed header or
    changed bytes."""
    file = folder / "x.safetensors"
    header, data = random.choice(_weights())
    if random.random() < 0.25:
        whole = json.dumps(header).encode()
        file.write_bytes(mutate.damaged(random, len(whole).to_bytes(8, "little") + whole + data))
    else:
        own = header.get("__metadata__", {}).get("deltaconv")
        if own is not None and random.random() < 0.7:
            described = mutate.text(random, mutate.changed(random, json.loads(own)))
            header = header | {"__metadata__": {"deltaconv": described}}
        else:
            header = mutate.changed(random, header)
        whole = mutate.text(random, header).encode(errors="surrogatepass")
        file.write_bytes(len(whole).to_bytes(8, "little") + whole + data)
    _mostly(lambda: read_header(file))
    hints = {
        "gate": random.choice((None, "simple", "x")),
        "scales": random.choice((None, (1.0, 0.5), (1, "2"))),
    }
    checkpoint = load_checkpoint(file, **(hints if random.random() < 0.2 else {}))
    return inspect.lines_of(checkpoint), model_card(checkpoint, "x"), json.dumps(header_of(checkpoint))


@cache
def _weights() -> tuple[tuple[dict[str, Any], bytes], ...]:
    """Headers and bytes of whole files."""
    torch.manual_seed(0)
    block = DeltaConvBlock(BlockSpec(8, 3), dtype=torch.float16)
    checkpoint = Checkpoint(
        "unet-8x1", {SITE: block}, {"down_blocks.0.resnets.0.conv1.bias": torch.ones(4)}, {"a": "b"}
    )
    own = {f"blocks.{SITE}.{name}": tensor for name, tensor in block.state_dict().items()}
    own |= {f"base_weights.{name}": tensor for name, tensor in checkpoint.base_weights.items()}
    path = SITE.removesuffix("attn1") + "conv1."
    authors = {
        "conv_up.weight": torch.ones(4, 8),
        "conv_up.bias": torch.ones(4),
        "conv_out.weight": torch.ones(8, 4),
        "conv_out.bias": torch.ones(8),
        "conv_pool.weight": torch.ones(8, 8),
        "conv_pool.bias": torch.ones(8),
        "gates.0.conv_spatial.weight": torch.ones(3, 3, 4),
        "gates.1.conv_spatial.weight": torch.ones(3, 3, 4),
    }
    mixer = HybridMixer(HybridSpec(8, 2, 4, landmarks=4, kernel_size=3, mean=True), dtype=torch.float16)
    fitted = Checkpoint("unet-8x1", {SITE: mixer}, {}, {"a": "b"}, {SITE.replace("down", "up"): "too wrong"})
    mixers = {f"blocks.{SITE}.{name}": tensor for name, tensor in mixer.state_dict().items()}
    files = (
        to_bytes(own, {"deltaconv": json.dumps(header_of(checkpoint))}),
        to_bytes({f"unet.{path}{name}": tensor for name, tensor in authors.items()}, {"scales": "[1, 0.5]"}),
        to_bytes(mixers, {"deltaconv": json.dumps(header_of(fitted))}),
    )
    split = []
    for file in files:
        end = 8 + int.from_bytes(file[:8], "little")
        split.append((json.loads(file[8:end]), file[end:]))
    return tuple(split)


def manifests(random: Random, folder: Path) -> object:
    """The user's list of weights."""
    file = folder / "manifest.json"
    records = random.choices(_records(), k=random.randint(1, 3))
    if random.random() < 0.2:
        file.write_bytes(mutate.damaged(random, json.dumps(records).encode()))
    else:
        file.write_text(
            mutate.text(random, mutate.changed(random, records)), encoding="utf-8", errors="surrogatepass"
        )
    manifest = load_manifest(file)
    for record in manifest:
        path = record.local_path(folder)
        if not (path.is_relative_to(folder) or path.resolve().is_relative_to(REPOSITORY)):
            raise AssertionError(f"{path} leads out of the folder")
        for text in (record.title, record.note, record.citation):
            text.encode()
    if not load_manifest().records.keys() <= manifest.records.keys():
        raise AssertionError("records of the project are gone")
    asked = mutate.word(random)
    return manifest.recommended(asked), _mostly(lambda: manifest[asked])


@cache
def _records() -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads(
        (REPOSITORY / "weights_manifest.json").read_text(encoding="utf-8")
    )
    return [record | {"name": f"own{number}"} for number, record in enumerate(records)]


def selectors(random: Random, folder: Path) -> object:
    """What a user types: blocks, kernel sizes, recommendations, addresses, options."""
    parts = [
        random.choice((mutate.word(random), "down", SITE, "up_blocks.*")) for _ in range(random.randint(1, 3))
    ]
    sizes: Any = random.choice(
        (7, {"down": 7, "mid_block": 5}, json.loads(Recommendation("sd15", {SITE: 5}).to_json()))
    )
    sizes = (
        mutate.text(random, mutate.changed(random, sizes)) if random.random() < 0.9 else mutate.word(random)
    )
    return [
        _mostly(lambda: select(",".join(parts), SHAPE.channels)),
        _mostly(
            lambda: block_specs(SHAPE, list(SHAPE.channels), sizes, random.choice(("lean", "released", "x")))
        ),
        _mostly(lambda: Recommendation.from_json(sizes)),
        _mostly(lambda: check_address(f"https://{mutate.word(random)}/x", proxied=True)),
        _mostly(lambda: _options(random, folder)),
    ]


def _options(random: Random, folder: Path) -> object:
    file = folder / random.choice(("options.json", "options.yaml"))
    options = {"model": "m", "data": "d", "betas": [0.9, 0.99], "layer_steps": 5, "tensorboard": True}
    file.write_text(
        mutate.text(random, mutate.changed(random, options)), encoding="utf-8", errors="surrogatepass"
    )
    if random.random() < 0.2:
        file.write_bytes(mutate.damaged(random, file.read_bytes()))
    return read_options({}, file)


def names(random: Random, folder: Path) -> object:
    """Names of files that are read, saved or measured into."""
    name = "/".join(mutate.word(random) for _ in range(random.randint(1, 3)))
    path = _mostly(lambda: free_path(folder, name, ".safetensors"))
    if isinstance(path, Path):
        if not path.resolve().is_relative_to(folder.resolve()):
            raise AssertionError(f"{path} leads out of the folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    inside = folder / name.replace("..", "").lstrip("/")
    return [
        _mostly(lambda: check_file(inside, "--json")),
        _mostly(lambda: check_folder(inside, "--output")),
        _mostly(lambda: load_checkpoint(name)),
        _mostly(lambda: load_manifest(inside).names()),
    ]


def runs(random: Random, folder: Path) -> object:
    """The folder of a run: its state, and its log."""
    header, tensors = _run()
    state = to_bytes(tensors, {RUN_KEY: json.dumps(header)})
    log = _log()
    what = random.random()
    if what < 0.4:
        log = mutate.damaged(random, log)
    elif what < 0.5:
        log = log.replace(b",", random.choice((b";", b"\t", b"")))
    elif what < 0.7:
        state = mutate.damaged(random, state)
    else:
        text = mutate.text(random, mutate.changed(random, header))
        state = to_bytes(tensors, {RUN_KEY: text})
    (folder / "state.safetensors").write_bytes(state)
    (folder / "log.csv").write_bytes(log)
    run = RunFolder(folder)
    _mostly(run.values)
    _mostly(run.read_log)
    return run.load()


@cache
def _run() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    header = {
        "format": 1, "step": 3, "settings": {"layer_steps": 2, "learning_rate": 1e-3}, "notes": {"a": "b"},
        "specs": {SITE: BlockSpec(8, 3).to_dict()}, "optimizer": {"0.step": 3.0}, "scaler": {},
    }  # fmt: skip
    return header, {"weights.a": torch.ones(4), "optimizer.0.exp_avg": torch.ones(4)}


@cache
def _log() -> bytes:
    file = io.StringIO(newline="")
    rows = csv.writer(file)
    rows.writerow(COLUMNS)
    rows.writerows([step, "layers", 1e-3, 0.5, "", "", 1.0] for step in range(1, 6))
    return file.getvalue().encode()


def fits(random: Random, folder: Path) -> object:
    """The state of a fit of hybrid mixers."""
    file = folder / "state.safetensors"
    header, sums = _fit()
    what = random.random()
    if what < 0.5:
        text = mutate.text(random, mutate.changed(random, header))
        file.write_bytes(to_bytes(sums, {FIT_KEY: text.encode(errors="replace").decode()}))
    elif what < 0.8:
        sums = dict(sums)
        name = random.choice(sorted(sums))
        tensor = sums.pop(name)
        for _ in range(random.randint(0, 2)):
            dtype = random.choice((torch.float64, torch.float64, torch.float32, torch.int64))
            changed = random.choice((tensor, -tensor, tensor * 0, tensor[:1], tensor.sum(), tensor[None]))
            key = random.choice((name, name, mutate.word(random), name.replace("0", "7")))
            sums[key.encode(errors="replace").decode()] = changed.to(dtype).clone()
        file.write_bytes(to_bytes(sums, {FIT_KEY: json.dumps(header)}))
    else:
        file.write_bytes(mutate.damaged(random, to_bytes(sums, {FIT_KEY: json.dumps(header)})))
    fit = _new_fit()
    try:
        fit.restore(file)
    finally:
        left = fit.pictures, fit.grids, fit._sums
    if not left[0] and left != (0, {}, {}):
        raise AssertionError("something was taken from a fit without pictures")
    return fit.fitted()


def _new_fit() -> HybridFit:
    specs = (HybridSpec(8, 2, 4, landmarks=4, kernel_size=3), HybridSpec(8, 2, 4, landmarks=4, mean=True))
    return HybridFit({SITE: specs}, FitSettings(rows=9, held_out=2))


@cache
def _fit() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Header and sums of the state after two pictures."""
    torch.manual_seed(0)
    fit = _new_fit()
    for number in range(2):
        fit.picture(number)
        fit.see(SITE, *torch.randn(3, 1, 2, 12, 4).unbind(), (3, 4))
    return json.loads(json.dumps(fit._described() | {"picture": 1})), named_sums(fit._sums)


def pictures(random: Random, folder: Path) -> object:
    """A folder of pictures with captions and a table."""
    ending, data = random.choice(_pictures())
    picture = folder / f"a{random.choice((ending, '.png', '.jpg', '.tif'))}"
    picture.write_bytes(mutate.damaged(random, data) if random.random() < 0.7 else data)
    (folder / "a.txt").write_bytes(b"a cat" if random.random() < 0.8 else mutate.damaged(random, b"a cat"))
    if random.random() < 0.4:
        row = mutate.changed(random, {"file_name": picture.name, "text": "a cat", "more": [1]})
        table = mutate.text(random, row).encode(errors="surrogatepass") + b"\n"
        (folder / "metadata.jsonl").write_bytes(
            table if random.random() < 0.8 else mutate.damaged(random, table)
        )
    found = find_pictures(folder, tell=lambda text: None)
    return [(one.caption.encode(), open_picture(one.path).size) for one in found]


@cache
def _pictures() -> tuple[tuple[str, bytes], ...]:
    from PIL import Image

    made = []
    for mode in ("RGB", "RGBA", "P", "L", "I;16", "1"):
        image = Image.new("RGB", (9, 7), "red") if mode != "I;16" else Image.new(mode, (9, 7))
        for ending in (".png", ".tif", ".webp", ".bmp", ".jpg", ".gif", ".ppm", ".eps", ".ico"):
            file = io.BytesIO()
            try:
                (image if mode == "I;16" else image.convert(mode)).save(
                    file, Image.registered_extensions()[ending]
                )
            except (OSError, KeyError, ValueError):
                continue
            made.append((ending, file.getvalue()))
    return tuple(made)


def sidecars(random: Random, folder: Path) -> object:
    """Small files beside others: the tuner's, a folder's config, other files of states."""
    tuned = folder / "fastest.json"
    content = {"version": fastest.FILE_VERSION, "choices": {"a": "b"}}
    tuned.write_text(
        mutate.text(random, mutate.changed(random, content)), encoding="utf-8", errors="surrogatepass"
    )
    if random.random() < 0.3:
        tuned.write_bytes(mutate.damaged(random, tuned.read_bytes()))
    fastest._load(tuned)
    header, data = random.choice((_weights()[0], _weights()[2]))
    whole = json.dumps(header).encode()
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(
        len(whole).to_bytes(8, "little") + whole + data
    )
    config = {"_class_name": "DeltaConvCheckpoint"} | json.loads(header["__metadata__"]["deltaconv"])
    (folder / "config.json").write_text(
        mutate.text(random, mutate.changed(random, config)), encoding="utf-8", errors="surrogatepass"
    )
    _mostly(lambda: read_file(folder / "fastest.json"))
    return load_checkpoint(folder)


def _mostly(read: Callable[[], object]) -> object:
    """What is read, or our own error, where more is to be tried after it."""
    try:
        return read()
    except DeltaConvError as error:
        return error


KINDS: dict[str, Reader] = {
    kind.__name__: kind for kind in (headers, manifests, selectors, names, runs, fits, pictures, sidecars)
}
