"""A model in one file, as ComfyUI's users have it: distilled by the command, used in ComfyUI."""

from __future__ import annotations

import json
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import deltaconv_core
from deltaconv_core.diffusers.distill import single_file, teacher
from deltaconv_core.diffusers.sites import find_sites
from deltaconv_core.errors import DeltaConvError
from testing.distill_command import arguments, environment, last_error, start


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_from_one_file_to_a_sample_in_comfyui(pack, comfy_host, tmp_path):
    """64 drawings, 20 steps; then ΔConv Patch Model on the same file, and ComfyUI's sampler."""
    import comfy.sample
    import comfy.sd

    from testing.comfy_models import in_pack, run_patch_node
    from testing.sd15_file import write_sd15

    file = write_sd15(tmp_path / "model.safetensors")
    options = {
        "model": file,
        "data": drawings(in_pack(pack, "demo.study.drawings"), tmp_path / "data", 64, 64),
        "tokenizer": comfy_host / "comfy" / "sd1_tokenizer",
        "output": tmp_path / "run",
        "resolution": 64,
        "layer_steps": 14,
        "output_steps": 6,
        "warmup": 2,
    }
    done = subprocess.run(
        [*start(), *arguments(**options)], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "16 blocks" in done.stdout and "learn from 64 pictures (64 of 64x64)" in done.stdout

    core = in_pack(pack, "deltaconv_core")
    checkpoint = core.load_checkpoint(tmp_path / "run" / "deltaconv.safetensors")
    assert checkpoint.architecture == "sd15" and checkpoint.metadata["steps"] == "20"
    with torch.inference_mode():
        model, clip, _, _ = comfy.sd.load_checkpoint_guess_config(str(file), output_vae=False)
        texts = [
            clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("one red circle left", "")
        ]
    patched = run_patch_node(pack, model, checkpoint)
    assert "stands in for 16 of 16 self-attentions of sd15" in patched.ui.as_dict()["text"][0]
    latent = torch.zeros(1, 4, 8, 8)
    noise = comfy.sample.prepare_noise(latent, seed=3)
    with torch.inference_mode():
        first, second = (
            comfy.sample.sample(
                one, noise, 2, 3.0, "euler", "normal", *texts, latent, disable_pbar=True, seed=3
            )
            for one in (model, patched.args[0])
        )
    assert first.isfinite().all() and second.isfinite().all()
    assert not torch.equal(first, second)
    assert (first - second).std() < first.std()  # 20 steps are few, but it is no other picture


def drawings(demo, folder, count, size):
    """Of the demo, with their prompts."""
    folder.mkdir()
    random = np.random.default_rng(0)
    prompts = demo.every_prompt()
    for number, prompt in enumerate(prompts[:: len(prompts) // count][:count]):
        picture = demo.draw(demo.random_scene(prompt, random), size)
        Image.fromarray(picture).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(str(prompt))
    return folder


@pytest.mark.parametrize(
    ("width", "architecture", "parameters", "text"),
    [
        (768, "sd15", 859_520_964, [123_060_480]),
        (1024, "sd21", 865_910_724, [340_387_840]),
        (2048, "sdxl", 2_567_463_684, [123_060_480, 694_659_840]),
    ],
)
def test_the_built_in_configurations(width, architecture, parameters, text):
    """Their U-Nets and text encoders have as many weights as the published ones."""
    import diffusers
    import transformers

    with single_file.configuration(width, {}) as folder, torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(
            diffusers.UNet2DConditionModel.load_config(folder, subfolder="unet")
        )
        vae = diffusers.AutoencoderKL.from_config(
            diffusers.AutoencoderKL.load_config(folder, subfolder="vae")
        )
        encoders = []
        for name, kind in (
            ("text_encoder", transformers.CLIPTextModel),
            ("text_encoder_2", transformers.CLIPTextModelWithProjection),
        ):
            if (folder / name).is_dir():
                config = transformers.CLIPTextConfig.from_pretrained(folder / name)
                encoders.append(kind(config))
        index = json.loads((folder / "model_index.json").read_text())
    assert find_sites(unet).architecture == architecture
    assert count(unet) == parameters and count(vae) == 83_653_863
    assert [count(encoder) for encoder in encoders] == text
    assert hasattr(diffusers, index["_class_name"])


@pytest.mark.parametrize(
    ("width", "names", "prediction", "size", "predicts", "last"),
    [
        (768, [], None, 64, "epsilon", 0.00466),
        (1024, [], "epsilon", 64, "epsilon", 0.00466),
        (1024, [], "v_prediction", 96, "v", 0.00466),
        (2048, [], None, 128, "epsilon", 0.00466),
        (2048, ["v_pred"], None, 128, "v", 0.00466),
        (2048, ["v_pred", "ztsnr"], None, 128, "v", 0.0),
    ],
)
def test_what_a_file_tells_of_itself(tmp_path, width, names, prediction, size, predicts, last):
    """Size in latents, what is predicted, and how much of the signal the last timestep has."""
    import diffusers

    file = tmp_path / "model.safetensors"
    save_file(
        {single_file.CONTEXT: torch.zeros(640, width), **{name: torch.zeros(0) for name in names}}, file
    )
    details = single_file.details(file, single_file.width_of(file), prediction)
    with single_file.configuration(width, details) as folder:
        unet = diffusers.UNet2DConditionModel.load_config(folder, subfolder="unet")
        scheduler = diffusers.DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    alphas, found = teacher._noise(scheduler, prediction)
    assert (unet["sample_size"], found) == (size, predicts)
    assert float(alphas[-1]) == pytest.approx(last, rel=1e-3)


def count(module):
    return sum(weight.numel() for weight in module.parameters())


@pytest.mark.parametrize(
    ("width", "pads"), [(768, ["<|endoftext|>"]), (1024, ["!"]), (2048, ["<|endoftext|>", "!"])]
)
def test_the_tokenizers(comfy_host, width, pads):
    made = single_file.tokenizers(width, comfy_host / "comfy" / "sd1_tokenizer")
    assert [one.pad_token for one in made.values()] == pads
    for one in made.values():
        tokens = one(
            "a cat", padding="max_length", truncation=True, max_length=one.model_max_length
        ).input_ids
        assert len(tokens) == 77 and tokens[:4] == [49406, 320, 2368, 49407]


def test_comfyui_around_the_repository_has_a_tokenizer(tmp_path, monkeypatch):
    repository = tmp_path / "custom_nodes" / "ComfyUI-DeltaConv"
    monkeypatch.setattr(single_file, "REPOSITORY", repository)
    assert single_file._of_comfyui() is None
    folder = tmp_path / "comfy" / "sd1_tokenizer"
    folder.mkdir(parents=True)
    assert single_file._of_comfyui() == folder


CLIP = {
    "vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 16,
}  # fmt: skip


@pytest.mark.parametrize("spoilt", [False, True])
def test_names_of_2022(tmp_path, spoilt):
    """The text encoder's names lacked `text_model.`; ComfyUI renames them."""
    import transformers

    torch.manual_seed(0)
    made = transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP))
    made.config.save_pretrained(tmp_path / "text_encoder")
    old = {
        f"cond_stage_model.transformer.{name.removeprefix('text_model.')}": weight.half()
        for name, weight in made.state_dict().items()
    }
    old["cond_stage_model.transformer.embeddings.position_ids"] = torch.arange(16.0)[None]
    if spoilt:
        del old["cond_stage_model.transformer.final_layer_norm.weight"]
    file = tmp_path / "model.safetensors"
    save_file(old | {"model.diffusion_model.x": torch.zeros(1)}, file)
    if spoilt:
        with pytest.raises(DeltaConvError, match="its text encoder lacks .*final_layer_norm.weight"):
            single_file.text_encoder(file, tmp_path)
        return
    (found,) = single_file.text_encoder(file, tmp_path).values()
    for name, weight in made.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight.half().float())
    renamed = {
        name.replace("transformer.", "transformer.text_model."): weight for name, weight in old.items()
    }
    save_file(renamed, file)
    assert single_file.text_encoder(file, tmp_path) == {}


def stub(width, *more, channels=4):
    tensors = {
        single_file.CONTEXT: torch.zeros(640, width),
        single_file.FIRST: torch.zeros(1, channels, 1, 1),
    }
    tensors |= {name: torch.zeros(1) for name in more}
    return lambda path: save_file(tensors, path)


VAE = "first_stage_model.x"
TEXT = "cond_stage_model.transformer.text_model.x"


@pytest.mark.parametrize(
    ("name", "make", "options", "message"),
    [
        ("model.ckpt", stub(768), {}, "does not end with .safetensors"),
        (
            "model.safetensors",
            lambda path: path.write_bytes(b"x" * 99),
            {},
            "is not a whole Stable Diffusion model",
        ),
        (
            "model.safetensors",
            lambda path: save_file({"a": torch.zeros(1)}, path),
            {},
            "is not a whole Stable Diff",
        ),
        ("model.safetensors", stub(4096), {}, "width 4096; built in are 768, 1024, 2048"),
        ("model.safetensors", stub(1024), {}, "name it with --prediction"),
        (
            "model.safetensors",
            stub(768, VAE, TEXT),
            {"tokenizer": "nowhere"},
            "merges.txt in --tokenizer nowhere",
        ),
        ("model.safetensors", stub(768), {"tokenizer": "clip"}, "diffusers cannot load"),
        (
            "model.safetensors",
            stub(768, VAE, TEXT),
            {"tokenizer": "clip"},
            "with the built-in configuration of Stable Diffusion 1.x",
        ),
        ("model.safetensors", stub(768, TEXT), {}, "no VAE (nothing under first_stage_model.)"),
        ("model.safetensors", stub(2048, VAE), {}, "a model of SDXL: it has no text encoder"),
        (
            "model.safetensors",
            stub(768, VAE, TEXT, channels=9),
            {},
            "is made for inpainting: its U-Net takes 9",
        ),
        ("model.safetensors", stub(768, channels=8), {}, "is made for editing by instructions"),
        ("model.safetensors", stub(2048, VAE, TEXT, "edm_mean"), {}, "noise levels of another kind (EDM"),
        (
            "model.safetensors",
            stub(2048, VAE, TEXT, "edm_vpred.sigma_max"),
            {},
            "noise levels of another kind",
        ),
        ("model.safetensors", stub(768, VAE, TEXT, "scaled_fp8"), {}, "quantised weights"),
        ("model.safetensors", stub(768, VAE, TEXT, "x.scale_weight"), {}, "quantised weights"),
        (
            "model.safetensors",
            stub(1024, VAE, "conditioner.embedders.0.model.x"),
            {"prediction": "epsilon"},
            "a text encoder under names of SDXL",
        ),
    ],
)
def test_bad_files(comfy_host, tmp_path, capsys, name, make, options, message):
    make(tmp_path / name)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    if options.get("tokenizer") == "clip":
        options = {"tokenizer": comfy_host / "comfy" / "sd1_tokenizer"}
    words = arguments(model=tmp_path / name, data=tmp_path, output=tmp_path / "run", **options)
    assert deltaconv_core.cli.main(words) == 2
    told = last_error(capsys)
    assert message in told and "/deltaconv-" not in told
    assert not (tmp_path / "run").exists()
