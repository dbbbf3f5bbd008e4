"""Model folders of other people: no code of theirs is run and no pickle opened."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from PIL import Image

from deltaconv_core.cli import main
from deltaconv_core.diffusers.pipeline_folder import load_joint, read_index
from deltaconv_core.errors import DeltaConvError
from testing.diffusers_models import make_pipeline

CODE = """
import pathlib
pathlib.Path({mark!r}).write_text("ran")
from diffusers import StableDiffusionPipeline as P, UNet2DConditionModel as U
class EvilPipeline(P): pass
class UNet2DConditionModel(U): pass
"""


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sound"
    folder.mkdir()
    make_pipeline(folder).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "model")


def index(folder, **parts):
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | parts))


def code(file):
    file.write_text(CODE.format(mark=str(file.with_name("ran"))))


def pipeline_class(folder):
    index(folder, _class_name=["evil", "EvilPipeline"])
    code(folder / "evil.py")


def part_class(folder):
    index(folder, unet=["evil", "UNet2DConditionModel"])
    code(folder / "unet" / "evil.py")


def file_that_no_index_names(folder):
    """Versions of diffusers before 0.38 look for f"{custom_pipeline}.py", with custom_pipeline None."""
    code(folder / "None.py")


def file_called_as_the_library(folder):
    code(folder / "unet" / "diffusers.py")


def file_called_as_the_class(folder):
    code(folder / "StableDiffusionPipeline.PY")


def module_on_the_path(folder):
    """Any module that Python finds would be imported, such as one in the current folder."""
    index(folder, scheduler=["evil_on_the_path", "Evil"])
    code(folder.parent / "evil_on_the_path.py")


def module_of_python(folder):
    index(folder, safety_checker=["antigravity", "fly"])


def relative_module(folder):
    index(folder, unet=["..evil", "Evil"])


def dotted_module(folder):
    index(folder, unet=["diffusers.utils.testing_utils", "os"])


def class_by_its_configuration(folder):
    """Auto classes take code that the configuration names, and ask on the terminal whether they may."""
    index(folder, text_encoder=["transformers", "AutoModel"])
    file = folder / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoModel": "evil.Evil"}}))


def three_words(folder):
    index(folder, unet=["diffusers", "UNet2DConditionModel", "more"])


def numbers(folder):
    index(folder, unet=[1, 2])


def no_class(folder):
    index(folder, _class_name=None)


def list_for_index(folder):
    (folder / "model_index.json").write_text("[]")


def deep_index(folder):
    (folder / "model_index.json").write_text("[" * 1000)


def half_a_letter(folder):
    index(folder, unet=["diffusers", "\ud800"])


def latin_index(folder):
    (folder / "model_index.json").write_bytes(b'{"_class_name": "\xff"}')


def shards(names):
    def spoil(folder):
        file = folder / "unet" / "diffusion_pytorch_model.safetensors"
        file.rename(file.with_suffix(".bin"))
        weights = {f"w{number}": name for number, name in enumerate(names)}
        text = json.dumps({"metadata": {}, "weight_map": weights})
        file.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(text)

    return spoil


def no_vocabulary(folder):
    """transformers makes a tokenizer of the rest, which fails at the first prompt."""
    for file in (folder / "tokenizer").iterdir():
        if file.name != "tokenizer_config.json":
            file.unlink()


def adapter(folder):
    (folder / "text_encoder" / "adapter_config.json").write_text('{"base_model_name_or_path": "other/model"}')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (pipeline_class, "name a class of diffusers as _class_name"),
        (part_class, "wants 'unet' from ['evil', 'UNet2DConditionModel']"),
        (file_that_no_index_names, "None.py is code"),
        (file_called_as_the_library, "diffusers.py is code"),
        (file_called_as_the_class, "StableDiffusionPipeline.PY is code"),
        (module_on_the_path, "wants 'scheduler' from"),
        (module_of_python, "wants 'safety_checker' from"),
        (relative_module, "wants 'unet' from"),
        (dotted_module, "wants 'unet' from"),
        (class_by_its_configuration, "wants 'text_encoder' from ['transformers', 'AutoModel']"),
        (three_words, "wants 'unet' from"),
        (numbers, "wants 'unet' from [1, 2]"),
        (no_class, "name a class of diffusers as _class_name"),
        (list_for_index, "name a class of diffusers as _class_name, got []"),
        (deep_index, "levels deep"),
        (half_a_letter, "surrogates"),
        (latin_index, "can't decode"),
        (shards(["a.safetensors", "diffusion_pytorch_model.bin"]), "names 'diffusion_pytorch_model.bin'"),
        (shards(["../../../x.safetensors"]), "names '../../../x.safetensors'"),
        (shards([None]), "diffusers cannot load"),
        (adapter, "adapter_config.json brings an adapter"),
        (no_vocabulary, "there is no vocabulary in"),
    ],
)
@pytest.mark.parametrize("command", ["locality", "distill", "model config"])
def test_folders_that_are_refused(folder, tmp_path, monkeypatch, capsys, spoil, message, command):
    spoil(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    modules = set(sys.modules)
    assert run(command, folder, tmp_path) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: ") and message in told
    assert not list(tmp_path.rglob("ran"))
    assert not {"evil", "evil_on_the_path", "antigravity"} & (set(sys.modules) - modules)


def run(command, folder, place):
    """Loads the folder with a command, whose input is sound otherwise."""
    if command == "locality":
        options = [
            "--output",
            place / "out",
            "--steps",
            "1",
            "--looks",
            "1",
            "--width",
            "32",
            "--height",
            "32",
        ]
        return main(["locality", str(folder), *map(str, options)])
    (place / "data").mkdir()
    Image.new("RGB", (64, 64)).save(place / "data" / "a.png")
    (place / "data" / "a.txt").write_text("x")
    teacher = {"model": folder}
    if command == "model config":
        (place / "whole.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
        teacher = {"model": place / "whole.safetensors", "model-config": folder}
    options = teacher | {"data": place / "data", "output": place / "run", "resolution": 32, "device": "cpu"}
    return main(["distill", *(word for name, value in options.items() for word in (f"--{name}", str(value)))])


def test_no_pickle_is_opened(sound, tmp_path, capsys):
    """Weights as .bin, which `locality` would have taken; what is opened is watched."""
    (tmp_path / "model").mkdir()
    make_pipeline(tmp_path / "model").save_pretrained(tmp_path / "model", safe_serialization=False)
    opened: list[str] = []
    watching = [True]
    sys.addaudithook(lambda event, args: watching and event == "open" and opened.append(str(args[0])))
    for command in ("locality", "distill"):
        assert run(command, tmp_path / "model", tmp_path) == 2
        assert "diffusers cannot load" in capsys.readouterr().err
    watching.clear()
    assert any(name.endswith("model_index.json") for name in opened)
    assert not [name for name in opened if name.endswith((".bin", ".pt", ".ckpt"))]


def test_a_pickle_is_not_opened_with_a_model_config_either(folder, tmp_path, capsys):
    """diffusers goes by the ending of a single file, and unpickles all but .safetensors."""
    (tmp_path / "whole.ckpt").write_bytes(b"\x80\x04.")
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (64, 64)).save(data / "a.png")
    (data / "a.txt").write_text("x")
    words = ["--model", tmp_path / "whole.ckpt", "--model-config", folder, "--data", data, "--device", "cpu"]
    assert main(["distill", *map(str, words)]) == 2
    assert "does not end with .safetensors; only such files are opened" in capsys.readouterr().err


def test_published_folders_are_taken(folder):
    """Modules of diffusers' own pipelines, parts that are left out, and settings beside them."""
    index(
        folder,
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        image_encoder=[None, None],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        requires_safety_checker=True,
    )
    (folder / "README.md").write_text("x")
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"w": "diffusion_pytorch_model-00001-of-00002.safetensors"}})
    )
    assert read_index(folder)["unet"] == ["diffusers", "UNet2DConditionModel"]


@pytest.mark.parametrize("named", [{"a": 1}, 5, "FluxTransformer2DModel", None])
def test_what_does_not_name_a_transformer_is_of_another_kind(folder, named):
    index(folder, transformer=named)
    assert load_joint(folder, torch.float32, None) is None


def test_a_folder_that_is_none(tmp_path):
    for place in (tmp_path / "gone", tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(DeltaConvError, match=r"with a model_index\.json; there is none in"):
            read_index(place)
