"""Joint mixers on ComfyUI's MODELs of text and image: FLUX, Chroma, SD 3, Lumina 2, Z-Image, Qwen-Image."""

from __future__ import annotations

import inspect

import pytest
import torch

from testing.comfy_joint_models import (
    joint_conditioning,
    joint_sites,
    make_joint,
    make_joint_mixers,
    sample_joint,
    with_joint,
)
from testing.comfy_models import in_pack, make_checkpoint, make_unet, run_patch_node, same_state, state
from testing.compare import largest_error

FAMILIES = [
    "flux",
    "flux_reference",
    "flux2",
    "flux2_reference",
    "chroma",
    "sd3",
    "sd35",
    "lumina2",
    "z_image",
    "qwen_image",
    "qwen_image_masked",
]
EXACT = {"landmarks": 2**14, "kernel_size": 0}
WINDOW = {"landmarks": 2, "window": 63, "kernel_size": 3}  # over the whole image: exact, whatever the kernels
MIXED = {"landmarks": 6, "kernel_size": 3}
SIZES = [(12, 16), (9, 14)]


@pytest.fixture(params=FAMILIES)
def name(request):
    from comfy.ldm.lumina.model import NextDiT

    if request.param == "qwen_image_masked" and not masks_qwen():
        pytest.skip("this ComfyUI does not mask Qwen-Image's text")
    if request.param == "z_image" and "pad_tokens_multiple" not in inspect.signature(NextDiT).parameters:
        pytest.skip("this ComfyUI is older than Z-Image")
    return request.param


def masks_qwen():
    from comfy.ldm.qwen_image.model import Attention

    return "attn_mask[" in inspect.getsource(Attention)


@pytest.fixture
def ran(pack, monkeypatch):
    """(heads, queries, keys, layout) of each call of a mixer."""
    module = in_pack(pack, "deltaconv_core.mixers.joint.module").JointMixer
    calls, own = [], module.forward

    def forward(self, q, k, v, layout, mask=None, attend=None):
        calls.append((q.shape[2], k.shape[2], layout, mask))
        return own(self, q, k, v, layout, mask, attend)

    monkeypatch.setattr(module, "forward", forward)
    return calls


@pytest.mark.parametrize("exact", [EXACT, WINDOW], ids=["landmarks", "window"])
@pytest.mark.parametrize("size", SIZES)
def test_where_mixers_are_attention_pictures_stay_and_the_model_untouched(pack, name, size, exact, ran):
    model = make_joint(name)
    before, weights = sample_joint(model, name, size), state(model)
    patched = with_joint(pack, model, make_joint_mixers(pack, model, **exact))
    own = sample_joint(patched, name, size)
    assert len(ran) == 2 * len(joint_sites(pack, model).channels)  # steps; both conditions in one call
    assert {layout.grid for _, _, layout, _ in ran} == {(-(-size[0] // 2), -(-size[1] // 2))}
    assert largest_error(own, before) < 1e-5
    patched.detach()
    assert torch.equal(sample_joint(model, name, size), before)
    model.detach()
    assert same_state(weights, model)
    for module in model.model.modules():
        own_forward = type(module).forward.__get__(module)
        assert module.__dict__.get("forward", own_forward) == own_forward


def test_mixers_change_pictures_and_come_off_again(pack, name):
    model = make_joint(name)
    checkpoint = make_joint_mixers(pack, model, **MIXED)
    before, patched = sample_joint(model, name), with_joint(pack, model, checkpoint)
    assert largest_error(sample_joint(patched, name), before) > 1e-4
    bare = in_pack(pack, "nodes.host.patch.applied").without_blocks(patched)
    assert torch.equal(sample_joint(bare, name), before) and bare.object_patches == model.object_patches


def test_each_mixer_sees_the_image_where_the_model_puts_it(pack, ran):
    """FLUX with a reference of 3 x 4 tokens: text, image, reference."""
    model = make_joint("flux_reference")
    sample_joint(with_joint(pack, model, make_joint_mixers(pack, model, **MIXED)), "flux_reference")
    assert {(q, k, layout.start, layout.grid) for q, k, layout, _ in ran} == {(65, 65, 5, (6, 8))}


def test_any_attention_alone_can_have_a_mixer(pack, name, ran):
    """The others stay attention, also those whose calls say where the image is."""
    model = make_joint(name)
    for id in joint_sites(pack, model).channels:
        patched = with_joint(pack, model, make_joint_mixers(pack, model, [id], **MIXED))
        ran.clear()
        sample_joint(patched, name, steps=1)
        assert ran, id
        patched.detach()


def test_a_padded_text_is_masked(pack, ran):
    if not masks_qwen():
        pytest.skip("this ComfyUI does not mask Qwen-Image's text")
    model = make_joint("qwen_image_masked")
    patched = with_joint(pack, model, make_joint_mixers(pack, model, **MIXED))
    own = sample_joint(patched, "qwen_image_masked")
    assert all(mask is not None and mask.shape[2] == 1 for *_, mask in ran)
    changed = joint_conditioning("qwen_image_masked")
    changed[0][0] = changed[0][0].clone()
    changed[0][0][:, 3:] += 7
    assert largest_error(sample_joint(patched, "qwen_image_masked", positive=changed), own) < 1e-5


def test_conditions_of_different_lengths(pack, name):
    """They are padded, or called one by one."""
    model = make_joint(name)
    longer = joint_conditioning(name)
    longer[0][0] = torch.cat([longer[0][0]] * 2, dim=1)
    longer[0][1] = {key: value for key, value in longer[0][1].items() if key != "attention_mask"}
    if "attention_mask" in joint_conditioning(name)[0][1]:
        longer[0][1]["attention_mask"] = torch.ones(1, 10, dtype=torch.long)
    before = sample_joint(model, name, negative=longer)
    patched = with_joint(pack, model, make_joint_mixers(pack, model, **EXACT))
    assert largest_error(sample_joint(patched, name, negative=longer), before) < 1e-5


def test_a_range_and_kept_sites(pack, ran):
    model = make_joint("flux")
    sites = list(joint_sites(pack, model).channels)
    checkpoint = make_joint_mixers(pack, model, sites[:2], **MIXED)
    sample_joint(with_joint(pack, model, checkpoint, end=0.2), "flux", steps=4)
    assert len(ran) == 2
    sample_joint(with_joint(pack, model, checkpoint, blocks="transformer_blocks.1"), "flux", steps=4)
    assert len(ran) == 2 + 4


# ---- together with others ----


def test_an_override_of_another_pack_answers_what_no_mixer_does(pack, ran):
    """Chained in either order; it is never overwritten."""
    model, asked = make_joint("flux"), []

    def override(attention, q, k, v, heads, **more):
        asked.append((q.shape[2], k.shape[2]))
        return attention(q, k, v, heads, **more)

    def with_override(model):
        clone = model.clone()
        clone.model_options["transformer_options"]["optimized_attention_override"] = override
        return clone

    checkpoint = make_joint_mixers(pack, model, joint_sites(pack, model).sites[0].ids, **MIXED)
    expected = sample_joint(with_joint(pack, model, checkpoint), "flux")
    before, after = with_override(model), with_joint(pack, model, checkpoint)
    for patched in (with_joint(pack, before, checkpoint), with_override(after)):
        asked.clear()
        assert torch.equal(sample_joint(patched, "flux"), expected)
        # the text's queries of the layer with a mixer, and the three layers without one
        assert asked[:4] == [(5, 53), (53, 53), (53, 53), (53, 53)]
        kept = patched.model_options["transformer_options"]["optimized_attention_override"]
        assert kept is override


@pytest.mark.parametrize("layer", ["double_blocks.0.img_attn.qkv", "single_blocks.1.linear1"])
def test_lora_acts(pack, layer):
    model = make_joint("flux")
    checkpoint = make_joint_mixers(pack, model, **MIXED)
    before = sample_joint(with_joint(pack, model, checkpoint), "flux")
    clone, key = model.clone(), f"diffusion_model.{layer}.weight"
    clone.add_patches({key: ("diff", (torch.ones_like(model.model_state_dict()[key]),))})
    patched = with_joint(pack, clone, checkpoint)
    assert largest_error(sample_joint(patched, "flux"), before) > 1e-4
    exact = with_joint(pack, clone, make_joint_mixers(pack, model, **EXACT))
    assert largest_error(sample_joint(exact, "flux"), sample_joint(clone, "flux")) < 1e-5


def test_a_forward_of_another_pack_still_runs_around_the_mixers(pack, ran):
    model, called = make_joint("flux"), []
    key = "diffusion_model.double_blocks.0.forward"
    own = model.model.diffusion_model.double_blocks[0].forward

    def around(*args, **call):
        called.append(1)
        return own(*args, **call)

    clone = model.clone()
    clone.add_object_patch(key, around)
    patched = with_joint(pack, clone, make_joint_mixers(pack, model, **EXACT))
    assert largest_error(sample_joint(patched, "flux"), sample_joint(model, "flux")) < 1e-5
    assert len(called) == 2 and len(ran) == 2 * 4


def test_a_forward_put_on_afterwards_is_named(pack, caplog):
    model = make_joint("flux")
    patched = with_joint(pack, model, make_joint_mixers(pack, model, **EXACT)).clone()
    patched.add_object_patch(
        "diffusion_model.double_blocks.0.forward", model.model.diffusion_model.double_blocks[0].forward
    )
    sample_joint(patched, "flux")
    assert "DoubleStreamBlock stands in place of blocks with joint mixers" in caplog.text


def test_block_replace_patches_of_others(pack, ran):
    """As nodes that skip or change whole blocks set them."""
    model = make_joint("flux")
    clone = model.clone()

    def replace(args, extra):
        return extra["original_block"](args)

    clone.set_model_patch_replace(replace, "dit", "double_block", 0)
    patched = with_joint(pack, clone, make_joint_mixers(pack, model, **EXACT))
    assert largest_error(sample_joint(patched, "flux"), sample_joint(model, "flux")) < 1e-5
    assert len(ran) == 2 * 4


@pytest.fixture
def cache():
    """ComfyUI's Flux KV Cache: from the second step on, references are keys without queries."""
    try:
        from comfy_extras import nodes_flux

        assert nodes_flux.FluxKVCache
    except (ImportError, AttributeError):
        pytest.skip("this ComfyUI has no Flux KV Cache")
    return nodes_flux


def cached(cache, model):
    return sample_joint(cache.FluxKVCache.execute(model).args[0], "flux2_reference", steps=3, cfg=1.0)


def test_the_host_s_own_cache_of_references_goes_with_mixers(pack, ran, cache):
    """Its keys come after the queries' own."""
    model = make_joint("flux2_reference")
    patched = with_joint(pack, model, make_joint_mixers(pack, model, **EXACT))
    assert largest_error(cached(cache, patched), cached(cache, model)) < 1e-5
    assert {(q, k) for q, k, *_ in ran} == {(512 + 48 + 12, 512 + 48 + 12), (512 + 48, 512 + 48 + 12)}


def test_keys_that_another_pack_adds_leave_attention_in_place(pack, ran, caplog, cache, monkeypatch):
    monkeypatch.setattr(cache, "KV_Attn_Input", type("MyKeys", (cache.KV_Attn_Input,), {}))
    model = make_joint("flux2_reference")
    patched = with_joint(pack, model, make_joint_mixers(pack, model, **EXACT))
    assert largest_error(cached(cache, patched), cached(cache, model)) < 1e-5
    assert {(q, k) for q, k, *_ in ran} == {(512 + 48 + 12, 512 + 48 + 12)}
    assert caplog.text.count("MyKeys (attn1 patch) adds keys, and may put them before the image") == 1


def test_layers_and_frames_keep_attention(pack, ran, caplog):
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    if "t_len" not in inspect.getsource(QwenImageTransformer2DModel):
        pytest.skip("this ComfyUI knows no layers")
    model = make_joint("qwen_image")
    patched = with_joint(pack, model, make_joint_mixers(pack, model, **MIXED))
    latent = torch.zeros(1, 16, 3, 12, 16)
    own = sample_joint(patched, "qwen_image", latent=latent)
    assert torch.equal(own, sample_joint(model, "qwen_image", latent=latent)) and not ran
    assert caplog.text.count("3 images one after the other") == 1


def test_a_mask_that_shows_queries_parts_of_the_image_keeps_attention(pack, ran, caplog):
    """As nodes for regional prompts set it: an override of theirs, put on after, around the mixers' own."""
    model = make_joint("flux")
    patched = with_joint(pack, model, make_joint_mixers(pack, model, **MIXED))
    block = model.model.diffusion_model.double_blocks[0]
    seen = torch.eye(53, dtype=torch.bool)

    def masked(forward):
        return lambda *args, **call: forward(*args, **call | {"attn_mask": seen})

    key = "diffusion_model.double_blocks.0.forward"
    assert patched.object_patches[key].site.path == "diffusion_model.double_blocks.0" and block is not None
    patched.object_patches[key] = masked(patched.object_patches[key])
    sample_joint(patched, "flux")
    assert len(ran) == 2 * 3
    assert caplog.text.count("only parts of the image") == 1


# ---- the node ----


def test_the_node_says_what_is_there_and_later_what_runs(pack, monkeypatch, caplog):
    """After every sampling, since a node that is cached shows its first text again; the log has it once."""
    caplog.set_level("INFO")
    model = make_joint("flux")
    sites = list(joint_sites(pack, model).channels)
    checkpoint = make_joint_mixers(pack, model, sites[:3], **MIXED)
    shown = []
    monkeypatch.setattr(
        in_pack(pack, "nodes.patch_model"), "show", lambda text, hidden: shown.append(text), raising=True
    )
    out = run_patch_node(pack, model, checkpoint)
    text = out.ui.as_dict()["text"][0]
    assert "A joint mixer stands in for 3 of 4 self-attentions of flux" in text
    assert "6 landmarks, K 3: 3 attentions (transformer_blocks.0.attn" in text
    assert "They were fitted to images of 6x8 tokens." in text
    assert f"Attention stays at {sites[3]}: it is cheap here." in text
    sample_joint(out.args[0], "flux")
    sample_joint(out.args[0], "flux")
    assert len(shown) == 2 and shown[0] == shown[1] and shown[0].startswith("Images of 6 x 8 tokens: ")
    assert caplog.text.count("Images of 6 x 8 tokens: ") == len(shown[0].splitlines())
    assert "3 attentions (transformer_blocks.0.attn, transformer_blocks.1.attn, single" in shown[0]


def test_at_a_size_where_mixers_do_not_pay_attention_runs(pack, ran, monkeypatch):
    plan = in_pack(pack, "deltaconv_core.mixers.joint.plan")
    monkeypatch.setattr(plan, "alternate", lambda *_: {"attention": [1.0], "mixer": [2.0]})
    model = make_joint("flux")
    patched = with_joint(pack, model, make_joint_mixers(pack, model, **MIXED), always=False)
    assert torch.equal(sample_joint(patched, "flux"), sample_joint(model, "flux")) and not ran


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("blocks", "whose attention is of text and image together"),
        ("family", "the weights are for qwen_image"),
        ("heads", "of 4 heads at"),
        ("no block", "hold no block.* use the MODEL without"),
        ("selection", "matches no site"),
        ("unet", "the weights are for flux"),
    ],
)
def test_what_does_not_go_together_is_refused(pack, what, said):
    errors = in_pack(pack, "deltaconv_core.errors").DeltaConvError
    model, blocks = make_joint("flux"), "all"
    checkpoint = make_joint_mixers(pack, model, **MIXED)
    if what == "blocks":
        checkpoint = make_checkpoint(pack, make_unet())
    elif what == "family":
        checkpoint.architecture = "qwen_image"
    elif what == "no block":
        checkpoint.blocks = {}
    elif what == "heads":
        joint = in_pack(pack, "deltaconv_core.mixers.joint")
        checkpoint.blocks = {
            id: joint.JointMixer(joint.JointSpec(32, 4, 8, **MIXED)) for id in checkpoint.blocks
        }
    elif what == "selection":
        blocks = "up_blocks"
    else:
        model = make_unet()
    before = dict(model.object_patches)
    with pytest.raises(errors, match=said):
        run_patch_node(pack, model, checkpoint, blocks)
    assert model.object_patches == before


def test_saved_and_loaded_by_the_nodes(pack, tmp_path, monkeypatch):
    model = make_joint("lumina2")
    checkpoint = make_joint_mixers(pack, model, **MIXED)
    folder = in_pack(pack, "nodes.host.files.model_folder")
    monkeypatch.setattr(folder, "path_to_save", lambda prefix: tmp_path / "joint.safetensors")
    in_pack(pack, "nodes.save_weights").SaveWeights.execute(checkpoint, "joint", "fp16", title="t")
    loaded = in_pack(pack, "deltaconv_core").load_checkpoint(tmp_path / "joint.safetensors")
    assert loaded.mixer == "joint" and loaded.architecture == "lumina2"
    own, expected = (sample_joint(with_joint(pack, model, c), "lumina2") for c in (loaded, checkpoint))
    assert largest_error(own, expected) < 1e-2
