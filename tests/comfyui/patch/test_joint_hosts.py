"""One file of joint mixers in both hosts, on ComfyUI's network and diffusers' with the same weights."""

from __future__ import annotations

import inspect

import pytest
import torch

from deltaconv_core import load_checkpoint, save_checkpoint
from deltaconv_core.diffusers import apply, remove
from deltaconv_core.diffusers.joint import find_joint
from deltaconv_core.mixers.joint import plan
from testing import comfy_joint_models
from testing.comfy_joint_models import (
    FLUX,
    LUMINA,
    TEXT,
    WIDTH,
    joint_sites,
    make_joint,
    make_joint_mixers,
    sample_joint,
    with_joint,
)
from testing.comfy_models import in_pack
from testing.compare import largest_error

diffusers = pytest.importorskip("diffusers")
CLASSES = {
    "flux": "FluxTransformer2DModel",
    "chroma": "ChromaTransformer2DModel",
    "flux2": "Flux2Transformer2DModel",
    "sd3": "SD3Transformer2DModel",
    "sd35": "SD3Transformer2DModel",
    "lumina2": "Lumina2Transformer2DModel",
    "z_image": "ZImageTransformer2DModel",
    "qwen_image": "QwenImageTransformer2DModel",
}
PACKED = ("flux", "chroma", "qwen_image")  # diffusers' class takes tokens of 2 x 2 latents
FOUR = {"mlp_ratio": 4.0}  # ComfyUI's table of names knows no other width
Z_IMAGE = {"dim": 256, "n_heads": 16, "n_kv_heads": 16, "multiple_of": 1, "ffn_dim_multiplier": 8 / 3}
Z_IMAGE |= {"z_image_modulation": True, "rope_theta": 256.0, "time_scale": 1000.0}


@pytest.fixture(params=CLASSES)
def name(request, monkeypatch):
    from comfy.ldm.lumina.model import NextDiT

    if not hasattr(diffusers, CLASSES[request.param]):
        pytest.skip(f"this diffusers has no {CLASSES[request.param]}")
    if request.param == "z_image" and "pad_tokens_multiple" not in inspect.signature(NextDiT).parameters:
        pytest.skip("this ComfyUI is older than Z-Image")
    if request.param in ("flux", "chroma"):
        monkeypatch.setattr(comfy_joint_models, "FLUX", FLUX | FOUR)
    if request.param == "z_image":
        monkeypatch.setattr(comfy_joint_models, "LUMINA", LUMINA | Z_IMAGE)
    return request.param


def test_a_file_of_either_host_answers_alike_in_the_other(pack, name, tmp_path, monkeypatch):
    monkeypatch.setattr(plan.Plan, "_found", lambda *_: plan.Verdict(True, None, "a test says so"))
    model = make_joint(name)
    twin = make_twin(name, model)
    given, expected = first_call(model, name)
    plain = answer(twin, name, given)
    assert largest_error(plain, expected) < 1e-4
    own, theirs = find_joint(twin), joint_sites(pack, model)
    assert (own.architecture, own.channels, own.heads) == (theirs.architecture, theirs.channels, theirs.heads)
    file, back = tmp_path / "comfyui.safetensors", tmp_path / "diffusers.safetensors"
    checkpoint = make_joint_mixers(pack, model, landmarks=6, kernel_size=3)
    in_pack(pack, "deltaconv_core").save_checkpoint(checkpoint, file)
    given, expected = first_call(with_joint(pack, model, checkpoint), name)
    apply(twin, file)
    mixed = answer(twin, name, given)
    assert largest_error(mixed, expected) < min(1e-4, largest_error(mixed, plain) / 100)
    remove(twin)
    assert torch.equal(answer(twin, name, given), plain)
    save_checkpoint(load_checkpoint(file), back)
    loaded = in_pack(pack, "deltaconv_core").load_checkpoint(back)
    assert torch.equal(first_call(with_joint(pack, model, loaded), name)[1], expected)


def first_call(model, name):
    """Arguments of the first call of ComfyUI's network while it samples, and the answer."""
    calls = []
    handle = model.model.diffusion_model.register_forward_hook(
        lambda _, args, kwargs, y: calls.append((args, kwargs, y)), with_kwargs=True
    )
    try:
        sample_joint(model, name)
    finally:
        handle.remove()
    (x, t), kwargs, y = calls[0]
    return kwargs | {"x": x, "t": t}, y


def make_twin(name, model):
    """diffusers' network with the weights of ComfyUI's."""
    from comfy import utils
    from comfy.ldm.flux import layers

    weights = model.model.diffusion_model.state_dict()
    made = getattr(diffusers, CLASSES[name])
    read = diffusers.loaders.single_file_utils
    flux = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
    flux |= {"joint_attention_dim": WIDTH, "axes_dims_rope": (4, 6, 6)}
    table = utils.flux_to_diffusers({"depth": 2, "depth_single_blocks": 2, "hidden_size": 32})
    if name == "flux":
        twin = made(**flux, in_channels=64, pooled_projection_dim=12)
        weights = renamed(weights, table)
    elif name == "chroma":
        twin = made(
            **flux, in_channels=64, approximator_num_channels=64, approximator_hidden_dim=32,
            approximator_layers=2,
        )  # fmt: skip
        last = torch.tensor([342, 343]) * 1000  # ComfyUI's last layer has these modulations at any depth
        embedding = diffusers.models.embeddings.get_timestep_embedding
        twin.time_text_embed.mod_proj[-2:] = embedding(last, 32, True, downscale_freq_shift=0)
        names = {"in_layer": "linear_1", "out_layer": "linear_2", "scale": "weight"}
        guidance = {key: t for key, t in weights.items() if key.startswith("distilled_guidance_layer")}
        for before, after in names.items():
            guidance = {key.replace(before, after): t for key, t in guidance.items()}
        weights = renamed(weights, table) | guidance
    elif name == "flux2":
        flux |= {"axes_dims_rope": (4, 4, 4, 4), "mlp_ratio": 2.0, "rope_theta": 10000}
        twin = made(**flux, in_channels=128, timestep_guidance_channels=256, guidance_embeds=False)
        if layers.RMSNorm is None:  # newer ComfyUIs have PyTorch's, and its default
            for module in twin.modules():
                if type(module).__name__ == "RMSNorm":
                    module.eps = None
        weights = read.convert_flux2_transformer_checkpoint_to_diffusers(dict(weights))
    elif name in ("sd3", "sd35"):
        twin = made(
            sample_size=64, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=64,
            num_attention_heads=2, joint_attention_dim=WIDTH, caption_projection_dim=128,
            pooled_projection_dim=12, pos_embed_max_size=32,
            dual_attention_layers=(0,) if name == "sd35" else (),
        )  # fmt: skip
        weights = renamed(weights, utils.mmdit_to_diffusers({"depth": 2, "num_blocks": 2}))
    elif name == "qwen_image":
        twin = made(
            in_channels=64, out_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
    elif name == "z_image":
        twin = made(
            in_channels=16, dim=256, n_layers=2, n_refiner_layers=1, n_heads=16, n_kv_heads=16,
            cap_feat_dim=WIDTH, axes_dims=[4, 6, 6], axes_lens=[300, 512, 512],
        )  # fmt: skip
        for number in (0, 2):  # as wide as the model, where both hosts have 1024 in the real one
            twin.t_embedder.mlp[number] = torch.nn.Linear(256, 256)
        weights = read.convert_z_image_transformer_checkpoint_to_diffusers(dict(weights))
    else:
        twin = made(
            in_channels=16, hidden_size=32, num_layers=2, num_refiner_layers=1, num_attention_heads=2,
            num_kv_heads=1, cap_feat_dim=WIDTH, axes_dim_rope=(4, 6, 6), axes_lens=(300, 512, 512),
        )  # fmt: skip
        parts = {}
        for key in [key for key in weights if "attention.qkv" in key]:
            for part, t in zip("qkv", weights.pop(key).split([32, 16, 16]), strict=True):
                parts[key.replace("attention.qkv", f"attn.to_{part}")] = t
        weights = read.convert_lumina2_to_diffusers(dict(weights)) | parts
    missing, _ = twin.load_state_dict(weights, strict=False)  # newer tables have names of newer versions
    assert not missing
    return twin.eval().requires_grad_(False)


def renamed(weights, table):
    """Weights of ComfyUI's network as diffusers names them, by ComfyUI's own table."""
    found = {}
    for theirs, entry in table.items():
        own, part, change = (entry, None, None) if isinstance(entry, str) else (*entry, None)[:3]
        if own in weights:
            weight = weights[own]
            if part is not None:
                dim, start, length = part
                weight = weight.narrow(dim, start, min(length, weight.shape[dim] - start))
            # The only change there is swaps two halves, so it is its own inverse.
            found[theirs] = weight if change is None else change(weight)
    return found


@torch.no_grad()
def answer(twin, name, given):
    """What diffusers' network answers to a call of ComfyUI's."""
    x, t, text = given["x"], given["t"], given["context"]
    call = {"hidden_states": x, "timestep": t, "encoder_hidden_states": text}
    height, width = x.shape[-2:]
    if name == "z_image":  # both of NextDiT's kind count time backwards, and so their answers
        return -torch.stack(twin([one[:, None] for one in x], 1 - t, list(text)).sample)[:, :, 0]
    if name == "lumina2":
        mask = torch.ones(text.shape[:2], dtype=torch.bool)
        return -twin(**call | {"timestep": 1 - t}, encoder_attention_mask=mask).sample
    if name in ("flux", "sd3", "sd35"):
        call["pooled_projections"] = given["y"]
    if name in PACKED:
        cut = x.reshape(len(x), 16, height // 2, 2, width // 2, 2)
        call["hidden_states"] = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        height, width = height // 2, width // 2
    if name in ("flux", "chroma"):
        call |= {"img_ids": image_ids(height, width, 3), "txt_ids": torch.zeros(TEXT, 3)}
    if name == "flux2":
        ids = torch.zeros(text.shape[1], 4)
        if not comfy_joint_models.detected(type_of_params()):
            ids[:, 3] = torch.arange(len(ids))
        call |= {"hidden_states": x.flatten(2).mT, "img_ids": image_ids(height, width, 4), "txt_ids": ids}
        call["guidance"] = None
    if name == "qwen_image":
        call["img_shapes"] = [[(1, height, width)]] * len(x)
    y = twin(**call).sample
    if name in PACKED:
        cut = y.reshape(len(x), height, width, 16, 2, 2)
        return cut.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
    return y.mT.reshape(x.shape) if name == "flux2" else y


def type_of_params():
    from comfy.ldm.flux.model import FluxParams

    return FluxParams


def image_ids(height, width, axes):
    ids = torch.zeros(height, width, axes)
    ids[..., 1], ids[..., 2] = torch.arange(height)[:, None], torch.arange(width)
    return ids.reshape(-1, axes)
