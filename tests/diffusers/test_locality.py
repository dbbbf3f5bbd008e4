"""`python -m deltaconv_core locality` on tiny pipelines of diffusers' own classes, saved to a folder."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from deltaconv_core import DeltaConvError
from deltaconv_core.cli import main
from deltaconv_core.locality import Recommendation
from scripts.comfy_host import prepare_torchvision
from testing.attention_maps import places

prepare_torchvision()  # diffusers imports it by way of transformers
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from deltaconv_core.diffusers.locality import LookSettings, look  # noqa: E402
from testing.diffusers_models import make_pixart_pipeline, make_tokenizer  # noqa: E402

CONTEXT = 16
VAE = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 32}
VAE |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


def stable_diffusion(folder: Path) -> Any:
    text = transformers.CLIPTextConfig(
        vocab_size=64, hidden_size=CONTEXT, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, sample_size=16,
        attention_head_dim=2, cross_attention_dim=CONTEXT,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        unet=unet,
        vae=diffusers.AutoencoderKL(**VAE),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=make_tokenizer(folder),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),  # more calls than steps
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(params=[stable_diffusion, make_pixart_pipeline], ids=["sd", "pixart"])
def pipeline(request, tmp_path):
    torch.manual_seed(0)
    made = request.param(tmp_path)
    made.set_progress_bar_config(disable=True)
    return made


def network_of(pipeline: Any) -> Any:
    return getattr(pipeline, "unet", None) or pipeline.transformer


# 24 x 32 pixels: the VAE halves them, PixArt's tokens are 2 x 2 latents.
GRIDS = {
    "StableDiffusionPipeline": [(12, 16), (6, 8), (12, 16), (12, 16)],
    "PixArtSigmaPipeline": [(6, 8)] * 3,
}


def test_statistics_are_those_of_the_attention(pipeline):
    """Against attention weights worked out from what the modules were given, by diffusers' own method."""
    network, weights = network_of(pipeline), {}

    def record(name):
        def hook(module, args, call):
            x = args[0] if args else call["hidden_states"]
            q, k = (module.head_to_batch_dim(project(x)) for project in (module.to_q, module.to_k))
            weights.setdefault(name, []).append(module.get_attention_scores(q, k))

        return hook

    names = [name for name, _ in network.named_modules() if name.endswith("attn1")]
    hooks = [
        network.get_submodule(name).register_forward_pre_hook(record(name), with_kwargs=True)
        for name in names
    ]
    architecture, layers = look(pipeline, LookSettings("a cat", 32, 24, steps=3, looks=9))
    for hook in hooks:
        hook.remove()
    assert sorted(layer.site for layer in layers) == sorted(names)
    assert architecture.startswith("dit" if isinstance(pipeline, diffusers.PixArtSigmaPipeline) else "unet")
    for layer in layers:
        maps = torch.stack(weights[layer.site]).flatten(0, 1).mean(dim=0)
        at = places(layer.grid)
        assert len(at) == maps.shape[0]
        far = (at[:, None] - at[None]).abs().amax(dim=2)
        expected = [float((maps * (far <= r)).sum(dim=1).mean()) for r in range(max(layer.grid))]
        assert layer.mass.tolist() == pytest.approx(expected, abs=1e-4)
        assert len(layer.by_moment) == len(weights[layer.site]) == len(pipeline.scheduler.timesteps)


def test_looking_leaves_nothing_behind(pipeline):
    def draw():
        options = {"num_inference_steps": 2, "output_type": "latent", "height": 24, "width": 32}
        if isinstance(pipeline, diffusers.PixArtSigmaPipeline):
            options["use_resolution_binning"] = False
        return pipeline("a cat", generator=torch.Generator().manual_seed(1), **options).images

    before = draw()
    part = "transformer_blocks.1" if hasattr(pipeline, "transformer") else "up"
    _, layers = look(pipeline, LookSettings("a cat", 32, 24, steps=4, looks=2), blocks=part)
    assert all(layer.site.startswith(part) and len(layer.by_moment) == 2 for layer in layers)
    assert torch.equal(draw(), before)
    assert not any(module._forward_pre_hooks for module in network_of(pipeline).modules())


def test_the_command(pipeline, tmp_path, capsys):
    pipeline.save_pretrained(tmp_path / "model")
    output = tmp_path / "out" / "put"
    arguments = ["locality", str(tmp_path / "model"), "--output", str(output), "--prompt", "a cat"]
    options = ["--width", "32", "--height", "24", "--steps", "3", "--looks", "2", "--device", "cpu"]
    assert main(arguments + options) == 0
    printed = capsys.readouterr().out
    assert "Every query was looked at." in printed and str(output) in printed
    with (output / "layers.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["tokens"] for row in table] == [f"{h}x{w}" for h, w in GRIDS[type(pipeline).__name__]]
    advice = Recommendation.from_json((output / "recommendation.json").read_text(encoding="utf-8"))
    assert {*advice.kernel_sizes, *advice.skip} == {row["site"] for row in table}
    with Image.open(output / "locality.png") as picture:
        assert picture.width == 1024
    assert (output / "curves.csv").stat().st_size > 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "with a model_index.json; there is none in"),
        (["--max-kernel-size", "4"], "odd kernel_size"),
        (["--steps", "0"], "at least one step and one look, got 0 steps"),
        (["--looks", "0"], "got 20 steps and 0 looks"),
        (["--device", "nonsense"], "cannot use the device 'nonsense'"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, message):
    assert main(["locality", str(tmp_path), *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told and told.count("\n") == 1


def test_a_damaged_folder_is_one_line(tmp_path, capsys):
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionPipeline", "unet": ["x", "Y"]}'
    )
    assert main(["locality", str(tmp_path)]) == 2
    assert "diffusers cannot load" in capsys.readouterr().err


def test_a_size_that_the_pipeline_refuses(pipeline):
    with pytest.raises(DeltaConvError, match=r"cannot draw this picture: .*divisible by .* 24 and 33"):
        look(pipeline, LookSettings("a cat", 33, 24))


def test_too_little_memory(pipeline, tmp_path, monkeypatch, capsys):
    def full(*args, **call):
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr(network_of(pipeline), "forward", full)
    with pytest.raises(DeltaConvError, match="cannot draw this picture: out of memory"):
        look(pipeline, LookSettings("a cat", 32, 24))
    pipeline.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(diffusers.DiffusionPipeline, "to", full)
    assert main(["locality", str(tmp_path / "model"), "--device", "cpu"]) == 2
    assert "diffusers cannot load" in capsys.readouterr().err


def test_weights_of_a_variant(tmp_path, monkeypatch, capsys):
    """A folder that holds no others, as published for fp16; and a picture that fails costs no tables."""
    torch.manual_seed(0)
    stable_diffusion(tmp_path).save_pretrained(tmp_path / "model", variant="fp16")
    output = tmp_path / "out"
    monkeypatch.setattr("deltaconv_core.locality.figure.save", None)
    arguments = ["locality", str(tmp_path / "model"), "--output", str(output), "--width", "32"]
    options = ["--height", "24", "--steps", "1", "--device", "cpu", "--blocks", "up"]
    assert main(arguments + options) == 2
    assert "diffusers cannot load" in capsys.readouterr().err
    with pytest.raises(TypeError):
        main([*arguments, *options, "--variant", "fp16"])
    names = sorted(path.name for path in output.iterdir())
    assert names == ["curves.csv", "layers.csv", "recommendation.json"]


@pytest.mark.parametrize("missing", ["matplotlib", "folder"])
def test_what_the_results_need_is_checked_before_the_sampling(tmp_path, monkeypatch, capsys, missing):
    torch.manual_seed(0)
    stable_diffusion(tmp_path).save_pretrained(tmp_path / "model")
    monkeypatch.setattr("deltaconv_core.diffusers.locality.look", None)
    output = tmp_path / "out"
    if missing == "folder":
        output.write_text("a file")
    else:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["locality", str(tmp_path / "model"), "--output", str(output), "--device", "cpu"]) == 2
    told = capsys.readouterr().err
    assert ("pip install matplotlib" if missing == "matplotlib" else "--output: cannot write to") in told


def test_other_models_are_refused():
    class Pipeline:
        transformer = torch.nn.Linear(2, 2)

    with pytest.raises(DeltaConvError, match=r"\(Linear\) has no self-attention.*U-Nets"):
        look(Pipeline(), LookSettings("a cat"))
    with pytest.raises(DeltaConvError, match="a pipeline with unet or transformer; got object"):
        look(object(), LookSettings("a cat"))
