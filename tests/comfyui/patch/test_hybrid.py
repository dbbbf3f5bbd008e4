"""Hybrid mixers on ComfyUI's MODELs: the attention's own layers still run around them."""

from __future__ import annotations

import pytest
import torch

from testing.comfy_models import (
    by_hand,
    in_pack,
    make_hybrids,
    make_pixart,
    make_unet,
    patch,
    run_patch_node,
    sample,
    untouched,
)
from testing.compare import largest_error

EXACT = {"landmarks": 2**14, "nystrom": "none"}
HYBRID = {"landmarks": 9, "nystrom": "none", "kernel_size": 3, "mean": True}
MAKERS = {"unet": make_unet, "pixart": make_pixart}
SIZES = {"unet": (16, 12), "pixart": (48, 44)}


@pytest.fixture(params=MAKERS)
def kind(request):
    return request.param


def test_with_a_landmark_for_each_token_pictures_stay_and_the_model_untouched(pack, kind):
    model, size = MAKERS[kind](), SIZES[kind]
    before = sample(model, size)
    with untouched(model, size):
        patched = patch(pack, model, make_hybrids(pack, model, **EXACT))
        own = sample(patched, size)
        patched.detach()
    assert largest_error(own, before) < 1e-4


def test_equals_the_mixer_put_in_by_hand(pack, kind):
    """The layers called one by one."""
    model, size = MAKERS[kind](), SIZES[kind]
    checkpoint = make_hybrids(pack, model, **HYBRID)
    plain, own = sample(model, size), sample(patch(pack, model, checkpoint), size)
    assert largest_error(own, plain) > 1e-3
    other = by_hand(MAKERS[kind](), checkpoint)
    assert largest_error(own, sample(other, size)) < 1e-5


def test_a_range_and_kept_sites(pack):
    model = make_unet()
    sites = list(make_hybrids(pack, model, **HYBRID).blocks)
    checkpoint = make_hybrids(pack, model, sites[:2], **HYBRID)
    out = run_patch_node(pack, model, checkpoint, end=0.2)
    text = out.ui.as_dict()["text"][0]
    assert f"A hybrid mixer stands in for 2 of {len(sites)}" in text
    assert f"Attention stays at {sites[2]}: it is cheap here." in text
    ranged, whole = sample(out.args[0]), sample(patch(pack, model, checkpoint))
    assert largest_error(ranged, sample(model)) > 1e-4 and largest_error(ranged, whole) > 1e-5


@pytest.mark.parametrize("layer", ["to_q", "to_k", "to_v", "to_out.0"])
def test_lora_acts_without_a_warning(pack, layer):
    """As a weight patch, the way that ComfyUI keeps LoRA."""
    model = make_unet()
    checkpoint = make_hybrids(pack, model, **HYBRID)
    before = sample(patch(pack, model, checkpoint))
    found = in_pack(pack, "nodes.host.model.sites").find_sites(model)
    clone = model.clone()
    keys = [f"{site.path}.{layer}.weight" for site in found.sites.values()]
    clone.add_patches(
        {key: ("diff", (torch.ones_like(model.model_state_dict()[key]) * 2.0,)) for key in keys}
    )
    out = run_patch_node(pack, clone, checkpoint)
    assert "Warning" not in out.ui.as_dict()["text"][0]
    assert largest_error(sample(out.args[0]), before) > 1e-5


def test_put_on_over_blocks_and_blocks_over_it(pack):
    from testing.comfy_models import make_checkpoint

    model = make_unet()
    checkpoint, blocks = make_hybrids(pack, model, **HYBRID), make_checkpoint(pack, model)
    wanted = sample(patch(pack, model, checkpoint)), sample(patch(pack, model, blocks))
    assert torch.equal(sample(patch(pack, patch(pack, model, blocks), checkpoint)), wanted[0])
    assert torch.equal(sample(patch(pack, patch(pack, model, checkpoint), blocks)), wanted[1])
    applied = in_pack(pack, "nodes.host.patch.applied")
    bare = applied.without_blocks(patch(pack, model, checkpoint))
    assert torch.equal(sample(bare), sample(model)) and bare.object_patches == model.object_patches


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(pack, dtype):
    model, half = make_unet(), make_unet(dtype)
    checkpoint = make_hybrids(pack, model, **HYBRID)
    whole, own = (sample(patch(pack, m, checkpoint)) for m in (model, half))
    error = (own.float() - whole).norm() / whole.norm()
    rounded = (sample(half).float() - sample(model)).norm() / sample(model).norm()
    assert error < max(2 * rounded, 2 * torch.finfo(dtype).eps)


def test_saved_and_loaded_by_the_nodes(pack, tmp_path, monkeypatch):
    """Through the model folder, as float16."""
    import folder_paths

    model = make_unet()
    checkpoint = make_hybrids(pack, model, **HYBRID)
    folder = in_pack(pack, "nodes.host.files.model_folder")
    monkeypatch.setattr(folder, "path_to_save", lambda prefix: tmp_path / "hybrid.safetensors")
    in_pack(pack, "nodes.save_weights").SaveWeights.execute(checkpoint, "hybrid", "fp16", title="t")
    loaded = in_pack(pack, "deltaconv_core").load_checkpoint(tmp_path / "hybrid.safetensors")
    assert loaded.mixer == "hybrid" and loaded.metadata["title"] == "t" and folder_paths
    assert largest_error(sample(patch(pack, model, loaded)), sample(patch(pack, model, checkpoint))) < 1e-2


def test_a_picture_in_other_tokens_is_refused(pack):
    """HyperTile hands the attention tiles."""
    from comfy_extras.nodes_hypertile import HyperTile

    import nodes as comfy_nodes
    from testing.comfy_models import called

    assert comfy_nodes
    model = make_unet()
    patched = patch(pack, model, make_hybrids(pack, model, **HYBRID))
    tiled = called(HyperTile, "generate", patched, 32, 2, 0, False)
    with pytest.raises(Exception, match="HyperTile"):
        sample(tiled, (64, 64))


def test_other_heads_are_refused(pack):
    model = make_unet()
    checkpoint = make_hybrids(pack, model, **HYBRID)
    hybrid = in_pack(pack, "deltaconv_core.mixers.hybrid")
    id, mixer = next(iter(checkpoint.blocks.items()))
    spec = mixer.spec
    checkpoint.blocks[id] = hybrid.HybridMixer(
        hybrid.HybridSpec(spec.dim, 2 * spec.heads, spec.head_dim // 2)
    )
    with pytest.raises(Exception, match=f"{2 * spec.heads} heads at {id}.* has {spec.heads} there"):
        patch(pack, model, checkpoint)


def test_the_benchmark_says_that_it_measures_blocks(pack):
    model = make_unet()
    measure = in_pack(pack, "nodes.host.bench.measure")
    found = in_pack(pack, "nodes.host.model.sites").find_sites(model)
    checkpoint = make_hybrids(pack, model, **HYBRID)
    for given in ((model, found, checkpoint, "lean"), (patch(pack, model, checkpoint), found, None, "lean")):
        with pytest.raises(Exception, match="ΔConv Benchmark works on ΔConvBlocks"):
            measure._blocks(*given)
