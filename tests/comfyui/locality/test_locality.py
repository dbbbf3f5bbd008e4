"""Looking at the attention of real ComfyUI models: the statistics are those of the q and k that they use."""

from __future__ import annotations

import inspect
import json
import sys

import pytest
import torch

from testing.attention_maps import places
from testing.comfy_joint_models import TEXT, joint_conditioning, make_joint
from testing.comfy_models import (
    called,
    conditioning,
    in_pack,
    make_pixart,
    make_unet,
    patch,
    same_state,
    sample,
    state,
    untouched,
    wrapped_by_compile,
)
from testing.comfy_patches import lora, pag, rescale_cfg, sag


def look(pack, model, size=(16, 12), batch=1, steps=2, looks=2, blocks="all", positive=None):
    """What the node's host code returns, run as ComfyUI's executor runs it."""
    host = in_pack(pack, "nodes.host.locality.look")
    channels = model.model.latent_format.latent_channels
    latent = {"samples": torch.zeros(batch, channels, *size)}
    positive = conditioning(1) if positive is None else positive
    with torch.inference_mode():
        return host.look(model, positive, latent, host.LookSettings(steps, looks, blocks, seed=3))


@pytest.fixture
def recorded(monkeypatch):
    """q and k of every attention among tokens of one kind, in the order of the calls; put in by hand."""
    calls = []

    def recorder(attention):
        def run(q, k, v, heads, *args, **more):
            split = more.get("skip_reshape")
            q4, k4 = (t if split else t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k))
            if q4.shape[2] == k4.shape[2]:
                calls.append((q4.clone(), k4.clone()))
            return attention(q, k, v, heads, *args, **more)

        return run

    modules = ["modules.attention", "pixart.blocks", "flux.math", "modules.diffusionmodules.mmdit"]
    for name in [*modules, "lumina.model", "qwen_image.model"]:
        module = __import__(f"comfy.ldm.{name}", fromlist=["_"])
        for function in ("optimized_attention", "optimized_attention_masked"):
            if hasattr(module, function):
                monkeypatch.setattr(module, function, recorder(getattr(module, function)))
    return calls


def by_definition(calls, grid, start=0):
    """(ASM at every odd K, share outside the image), averaged over calls, batch, heads and queries."""
    n = grid[0] * grid[1]
    image = slice(start, start + n)
    logits = [(q[:, :, image] @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).double() for q, k in calls]
    outside = 1 - torch.stack([one.softmax(dim=-1)[..., image].sum(dim=-1) for one in logits]).mean()
    maps = torch.stack([one[..., image].softmax(dim=-1) for one in logits]).mean(dim=(0, 1, 2))
    at = places(grid)
    far = (at[:, None] - at[None]).abs().amax(dim=2)
    return [float((maps * (far <= r)).sum(dim=1).mean()) for r in range(max(grid))], float(outside)


def assert_is(layer, calls, start=0):
    mass, outside = by_definition(calls, layer.grid, start)
    assert layer.mass.tolist() == pytest.approx(mass, abs=1e-4)
    assert layer.outside == pytest.approx(outside, abs=1e-4)


# ---- U-Nets and PixArt ----


@pytest.mark.parametrize("size", [(16, 12), (17, 23)])
@pytest.mark.parametrize("batch", [1, 2])
def test_unet(pack, unet, recorded, size, batch):
    seen = look(pack, unet, size, batch)
    assert [layer.site for layer in seen.layers] == list(
        in_pack(pack, "nodes.host.model.sites").find_sites(unet).sites
    )
    assert seen.architecture == "unet-32x2-64x3" and seen.replaceable and not seen.unseen
    half = (-(-size[0] // 2), -(-size[1] // 2))
    assert [layer.grid for layer in seen.layers] == [size, half, half, half, size]
    for i, layer in enumerate(seen.layers):
        assert_is(layer, recorded[i::5])
        assert (layer.channels, layer.heads) == ((32, 2) if layer.grid == size else (64, 4))
        assert list(layer.by_moment) == ["1/2", "2/2"]


def test_pixart(pack, pixart, recorded):
    seen = look(pack, pixart, (64, 48))
    assert [layer.grid for layer in seen.layers] == [(32, 24)] * 2
    for i, layer in enumerate(seen.layers):
        assert_is(layer, recorded[i::2])


def test_only_some_blocks_and_steps(pack, unet, recorded):
    seen = look(pack, unet, steps=5, looks=2, blocks="mid,up_blocks.1")
    assert [layer.site.split(".")[0] for layer in seen.layers] == ["mid_block", "up_blocks"]
    for i, layer in zip((2, 4), seen.layers, strict=True):
        assert_is(layer, [recorded[5 * 1 + i], recorded[5 * 3 + i]])
        assert list(layer.by_moment) == ["2/5", "4/5"]


def test_lora_is_seen(pack, unet, recorded):
    seen = look(pack, lora(unet))
    assert_is(seen.layers[2], recorded[2::5])
    plain = look(pack, unet)
    assert not torch.allclose(seen.layers[2].mass, plain.layers[2].mass, atol=1e-4)


@pytest.mark.parametrize(
    ("base", "manual_cast"),
    [(torch.bfloat16, None), (torch.float16, torch.float32), (torch.float8_e4m3fn, torch.bfloat16)],
    ids=["bf16", "fp16 computing in fp32", "fp8 computing in bf16"],
)
def test_other_dtypes(pack, recorded, base, manual_cast):
    model = make_unet(base, manual_cast)
    before = state(model)
    seen = look(pack, model)
    calls = [(q.float(), k.float()) for q, k in recorded]
    for i, layer in enumerate(seen.layers):
        assert_is(layer, calls[i::5])
    model.detach()
    assert same_state(before, model)


# ---- joint attention ----

JOINT = {
    "flux": (TEXT, ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]
             + ["single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn"]),
    "flux_reference": (TEXT, ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]
                       + ["single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn"]),
    "sd3": (TEXT, ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]),
    "sd35": (TEXT, ["transformer_blocks.0.attn", "transformer_blocks.0.attn2", "transformer_blocks.1.attn"]),
    "lumina2": (TEXT, ["noise_refiner.0.attn", "layers.0.attn", "layers.1.attn"]),
    "z_image": (32, ["noise_refiner.0.attn", "layers.0.attn", "layers.1.attn"]),
    "qwen_image": (TEXT, ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]),
}  # fmt: skip


@pytest.mark.parametrize("name", JOINT)
@pytest.mark.parametrize("size", [(12, 16), (9, 14)])
def test_joint_attention(pack, recorded, name, size):
    """The image among text, reference pictures and filling, where the model's own code puts it."""
    text, ids = JOINT[name]
    if name == "z_image" and not knows_z_image():
        pytest.skip("this ComfyUI is older than Z-Image")
    model = make_joint(name)
    seen = look(pack, model, size, positive=joint_conditioning(name))
    assert [layer.site for layer in seen.layers] == ids and not seen.replaceable
    if name in ("lumina2", "z_image"):  # the text's own refiner is called first
        del recorded[::4]
    for i, layer in enumerate(seen.layers):
        assert layer.grid == (-(-size[0] // 2), -(-size[1] // 2))
        of_image_alone = layer.site.startswith("noise_refiner") or layer.site.endswith("attn2")
        assert_is(layer, recorded[i :: len(ids)], start=0 if of_image_alone else text)
        assert of_image_alone or layer.outside > 0.02


def knows_z_image():
    from comfy.ldm.lumina.model import NextDiT

    return "pad_tokens_multiple" in inspect.signature(NextDiT).parameters


def test_joint_attention_is_for_looking_only(pack):
    output = run_node(pack, make_joint("flux"), (12, 16), joint_conditioning("flux"))
    advice = json.loads(output.args[2])
    assert advice["architecture"] == "flux" and advice["kernel_sizes"] == {} and len(advice["skip"]) == 4
    assert "other" in output.args[1].splitlines()[2]


# ---- the MODEL stays as it is ----


@pytest.mark.parametrize(("make", "size"), [(make_unet, (16, 12)), (make_pixart, (64, 48))])
def test_nothing_is_left_behind(pack, make, size):
    model = make()
    with untouched(model, size):
        look(pack, model, size)


def test_looking_changes_nothing_in_the_sampling(pack, unet, monkeypatch):
    import comfy.samplers

    results = []
    original = comfy.samplers.CFGGuider.sample

    def keep(self, *args, **kwargs):
        results.append(original(self, *args, **kwargs))
        return results[-1]

    monkeypatch.setattr(comfy.samplers.CFGGuider, "sample", keep)
    for looks in (1, 3):
        look(pack, unet, steps=3, looks=looks)
    assert torch.equal(*results)


def test_an_interruption_stops_at_once_and_restores(pack, unet, monkeypatch):
    import comfy.model_management

    statistics = sys.modules[in_pack(pack, "deltaconv_core.locality").LayerStatistics.__module__]
    monkeypatch.setattr(statistics, "MAP_BYTES", 1)  # a chunk for every query
    calls = []

    def interrupted():
        calls.append(1)
        if len(calls) == 5:
            raise comfy.model_management.InterruptProcessingException()

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", interrupted)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        look(pack, unet)
    monkeypatch.undo()
    assert len(calls) == 5
    for module in unet.model.modules():
        own = type(module).forward.__get__(module)
        assert module.__dict__.get("forward", own) == own


def test_progress_is_shown_to_the_end(pack, unet, monkeypatch):
    import comfy.utils

    seen = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: seen.append((value, total))
    )
    look(pack, unet, steps=4, looks=2)
    ours = [value for value, total in seen if total == 4 + 2 * 5]
    assert ours[-1] == 14 and ours == sorted(set(ours))  # newer versions of ComfyUI thin it out


def test_replacements_of_the_attention_are_left_out(pack, unet, checkpoint):
    plain = look(pack, unet)
    node = in_pack(pack, "nodes.neighborhood").NeighborhoodAttention
    patched = patch(pack, unet, checkpoint)
    for model in (patched, patch(pack, unet, checkpoint, end=0.5), node.execute(unet, 3, "all").args[0]):
        for layer, expected in zip(look(pack, model).layers, plain.layers, strict=True):
            assert torch.equal(layer.mass, expected.mass)
    assert torch.equal(sample(patched), sample(patch(pack, unet, checkpoint)))


def compiled(model):
    """The wrapper of torch.compile, whose code was made before anybody looked."""
    from comfy.patcher_extension import WrappersMP
    from comfy_api.torch_helpers.torch_compile import COMPILE_KEY

    def hidden(*args, **call):
        raise AssertionError("compiled code was called")

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, COMPILE_KEY, hidden)
    return clone


@pytest.mark.parametrize("add", [pag, sag, rescale_cfg, compiled, wrapped_by_compile])
def test_guidance_and_compiled_code_do_not_count(pack, unet, add):
    """SAG puts a replacement of its own into the middle, which is named."""
    plain = {layer.site: layer for layer in look(pack, unet).layers}
    seen = look(pack, add(unet))
    assert [site.split(".")[0] for site in seen.unseen] == (["mid_block"] if add is sag else [])
    assert len(seen.layers) + len(seen.unseen) == 5
    for layer in seen.layers:
        assert torch.equal(layer.mass, plain[layer.site].mass)
        assert list(layer.by_moment) == ["1/2", "2/2"]


# ---- the node ----


def run_node(pack, model, size=(16, 12), positive=None, latent=None, **changes):
    node = in_pack(pack, "nodes.locality").AttentionLocality
    options = {"seed": 0, "steps": 2, "looks": 1, "blocks": "all", "max_kernel_size": 13} | changes
    channels = model.model.latent_format.latent_channels
    latent = latent or {"samples": torch.zeros(1, channels, *size)}
    with torch.inference_mode():
        return node.execute(model, conditioning(1) if positive is None else positive, latent, **options)


def test_node_outputs(pack, unet, caplog):
    with caplog.at_level("INFO"):
        picture, table, advice = run_node(pack, unet).args
    assert picture.shape[0] == 1 and picture.shape[2:] == (1024, 3) and picture.dtype == torch.float32
    assert 0 <= picture.min() < picture.mean() < 0.5 < picture.max() <= 1
    lines = table.splitlines()
    assert lines[0] == "Self-attention of unet-32x2-64x3, 12 × 16 latent, steps 2 of 2"
    assert [line.split()[1] for line in lines[4:9]] == ["down0.0", "down1.0", "mid", "up0.1", "up1.1"]
    core = in_pack(pack, "deltaconv_core.locality")
    read = core.Recommendation.from_json(advice)
    assert read.architecture == "unet-32x2-64x3"
    assert len(read.kernel_sizes) + len(read.skip) == 5
    assert any("Looked at 5 self-attentions" in record.getMessage() for record in caplog.records)


def test_an_empty_latent_is_made_to_fit(pack, unet, monkeypatch):
    """Newer versions of ComfyUI scale it: what stands for 8 pixels may have to stand for 16."""
    import comfy.sample

    def fix(model, latent_image, downscale_ratio_spacial=None, downscale_ratio_temporal=None):
        assert (downscale_ratio_spacial, downscale_ratio_temporal) == (8, None)
        return latent_image[..., ::2, ::2]

    monkeypatch.setattr(comfy.sample, "fix_empty_latent_channels", fix)
    latent = {"samples": torch.zeros(1, 4, 32, 24), "downscale_ratio_spacial": 8}
    table = run_node(pack, unet, latent=latent).args[1]
    assert table.splitlines()[0] == "Self-attention of unet-32x2-64x3, 12 × 16 latent, steps 2 of 2"
    assert " 16x12 |" in table


def test_matplotlib_is_looked_for_before_the_sampling(pack, unet, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(in_pack(pack, "nodes.locality"), "look", None)
    errors = in_pack(pack, "deltaconv_core.errors")
    with pytest.raises(errors.DeltaConvError, match="pip install matplotlib"):
        run_node(pack, unet)


def test_sites_that_are_never_called_are_named(pack, unet):
    model = unet.clone()
    model.set_model_attn1_replace(lambda q, k, v, options: q, "middle", 0)
    seen = look(pack, model)
    assert [layer.site.split(".")[0] for layer in seen.layers] == ["down_blocks"] * 2 + ["up_blocks"] * 2
    assert seen.unseen == ["mid_block.attentions.0.transformer_blocks.0.attn1"]
    output = run_node(pack, model)
    assert len(json.loads(output.args[2])["kernel_sizes"]) + len(json.loads(output.args[2])["skip"]) == 4
    errors = in_pack(pack, "deltaconv_core.errors")
    with pytest.raises(errors.DeltaConvError, match="none of the 1 self-attentions was called"):
        look(pack, model, blocks="mid")


def area():
    return [[conditioning(1)[0][0], {"area": (8, 8, 0, 0), "strength": 1.0}], *conditioning(2)]


def merged(model):
    from comfy_extras.nodes_tomesd import TomePatchModel

    return called(TomePatchModel, "patch", model, 0.5)


REFUSALS = {
    "tokens merged": ({"model": merged}, {}, "expected 16 x 16 = 256 tokens.*Token Merging"),
    "areas": ({}, {"positive": area()}, "token grid was .* and is now .*without areas"),
    "blocks": ({}, {"blocks": "side"}, "'side' matches no site"),
    "even limit": ({}, {"max_kernel_size": 4}, "odd kernel_size.* got 4"),
    "no looks": ({}, {"looks": 0}, "at least one step and one look, got 2 steps and 0 looks"),
}


@pytest.mark.parametrize(("changes", "options", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(pack, unet, changes, options, message):
    errors = in_pack(pack, "deltaconv_core.errors")
    model = changes["model"](unet) if changes else unet
    with pytest.raises(errors.DeltaConvError, match=message):
        run_node(pack, model, (16, 16), **options)
    assert sample(unet).isfinite().all()


def test_a_model_without_self_attention(pack):
    errors = in_pack(pack, "deltaconv_core.errors")
    without = make_unet(
        transformer_depth=[0, 0], transformer_depth_output=[0, 0, 0, 0], transformer_depth_middle=-1
    )
    with pytest.raises(errors.DeltaConvError, match="has no self-attention"):
        run_node(pack, without)
