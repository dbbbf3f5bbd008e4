"""Sites of ComfyUI's models under diffusers' names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from testing.comfy_models import in_pack, make_pixart, make_unet, run_patch_node

SD = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_spatial_transformer": True,
    "num_classes": None,
    "adm_in_channels": None,
    "legacy": False,
}
SD15 = SD | {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "num_heads": 8,
    "num_head_channels": -1,
    "context_dim": 768,
}
SDXL = SD | {
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "num_heads": -1,
    "num_head_channels": 64,
    "context_dim": 2048,
}
CONFIGS = {
    "sd15": SD15,
    "sd21": SD15 | {"context_dim": 1024, "use_linear_in_transformer": True},
    "sdxl": SDXL,
    "ssd1b": SDXL
    | {
        "transformer_depth": [0, 0, 2, 2, 4, 4],
        "transformer_depth_output": [0, 0, 0, 1, 1, 2, 10, 4, 4],
        "transformer_depth_middle": -1,
    },
}


def on_meta(config: dict[str, Any]) -> Any:
    """What find_sites reads of a ModelPatcher, around a U-Net without weights."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    operations = comfy.ops.disable_weight_init
    network = UNetModel(
        **{k: v[:] if isinstance(v, list) else v for k, v in config.items()},
        device="meta",
        operations=operations,
    )
    model = SimpleNamespace(model_config=SimpleNamespace(unet_config=config), diffusion_model=network)
    return SimpleNamespace(
        model=model, get_model_object=lambda name: getattr(model, name), object_patches_backup={}
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_known_unets(pack, name):
    found = in_pack(pack, "nodes.host.model.sites").find_sites(on_meta(CONFIGS[name]))
    assert found.channels == in_pack(pack, "deltaconv_core.sites").site_channels(name)
    assert found.architecture == name


@pytest.mark.parametrize(("name", "extra_inputs"), [("sd15", 5), ("sd15", 4), ("sdxl", 5)])
def test_inpainting_variants_are_the_same_architecture(pack, name, extra_inputs):
    config = CONFIGS[name] | {"in_channels": 4 + extra_inputs}
    assert in_pack(pack, "nodes.host.model.sites").find_sites(on_meta(config)).architecture == name


@pytest.mark.parametrize("name", CONFIGS)
def test_convolutions_are_where_comfyui_maps_them(pack, name):
    """ComfyUI has a table of its own, made from the configuration and not from the structure."""
    import comfy.utils

    table = comfy.utils.unet_to_diffusers(
        {k: v[:] if isinstance(v, list) else v for k, v in CONFIGS[name].items()}
    )
    found = in_pack(pack, "nodes.host.model.sites").find_sites(on_meta(CONFIGS[name]))
    expected = {key: f"diffusion_model.{table[key]}" for key in table if key.endswith(".conv1.weight")}
    if CONFIGS[name]["transformer_depth_middle"] == -1:
        del expected["mid_block.resnets.1.conv1.weight"]  # in the table, but not in such a network
    assert {f"{k}.weight": f"{v}.weight" for k, v in found.convolutions.items()} == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_attentions_are_where_comfyui_maps_them(pack, name):
    import comfy.utils

    table = comfy.utils.unet_to_diffusers(
        {k: v[:] if isinstance(v, list) else v for k, v in CONFIGS[name].items()}
    )
    found = in_pack(pack, "nodes.host.model.sites").find_sites(on_meta(CONFIGS[name]))
    for site in found.sites.values():
        assert f"diffusion_model.{table[site.id + '.to_q.weight']}" == f"{site.path}.to_q.weight"


OTHERS = {
    "one level": (
        {"channel_mult": [2], "num_res_blocks": [1], "transformer_depth": [3]}
        | {"transformer_depth_output": [0, 2]},
        {"down_blocks.0.attentions.0": 3, "mid_block.attentions.0": 1, "up_blocks.0.attentions.0": 2},
    ),
    "no middle": (
        {"transformer_depth": [0, 2], "transformer_depth_output": [0, 0, 0, 1]}
        | {"transformer_depth_middle": -2},
        {"down_blocks.1.attentions.0": 2, "up_blocks.0.attentions.0": 1},
    ),
    "uneven": (
        {"num_res_blocks": [1, 3], "transformer_depth": [0, 0, 1, 1]}
        | {"transformer_depth_output": [0, 0, 1, 0, 0, 0]},
        {"down_blocks.1.attentions.1": 1, "down_blocks.1.attentions.2": 1}
        | {"mid_block.attentions.0": 1, "up_blocks.0.attentions.3": 1},
    ),
    "resnets change the size": (
        {"resblock_updown": True},
        {"down_blocks.0.attentions.0": 1, "down_blocks.1.attentions.0": 1, "mid_block.attentions.0": 1}
        | {"up_blocks.0.attentions.1": 1, "up_blocks.1.attentions.1": 1},
    ),
    "video: the attention over time is left alone": (
        {"use_temporal_attention": True, "use_temporal_resblock": True, "extra_ff_mix_layer": True}
        | {"merge_strategy": "learned_with_images", "video_kernel_size": [3, 1, 1]},
        {"down_blocks.0.attentions.0": 1, "down_blocks.1.attentions.0": 1, "mid_block.attentions.0": 1}
        | {"up_blocks.0.attentions.1": 1, "up_blocks.1.attentions.1": 1},
    ),
    "cross-attention only": (
        {"disable_self_attentions": [True, False]},
        {"down_blocks.1.attentions.0": 1, "mid_block.attentions.0": 1, "up_blocks.0.attentions.1": 1},
    ),
}


@pytest.mark.parametrize(("changes", "expected"), OTHERS.values(), ids=OTHERS)
def test_other_unets_by_structure(pack, changes, expected):
    found = in_pack(pack, "nodes.host.model.sites").find_sites(make_unet(**changes))
    assert list(found.sites) == [
        f"{at}.transformer_blocks.{i}.attn1" for at, n in expected.items() for i in range(n)
    ]


def test_pixart(pack):
    found = in_pack(pack, "nodes.host.model.sites").find_sites(make_pixart())
    assert found.channels == {"transformer_blocks.0.attn1": 48, "transformer_blocks.1.attn1": 48}
    assert found.sites["transformer_blocks.1.attn1"].path == "diffusion_model.blocks.1.attn"
    assert found.convolutions == {}


def test_sites_are_found_while_a_patched_clone_is_loaded(pack, unet, checkpoint):
    from testing.comfy_models import patch, sample

    sample(patch(pack, unet, checkpoint))
    assert in_pack(pack, "nodes.host.model.sites").find_sites(unet).channels == {
        id: block.spec.dim for id, block in checkpoint.blocks.items()
    }


def test_a_model_without_sites_is_refused(pack):
    errors = in_pack(pack, "deltaconv_core.errors")
    network = SimpleNamespace(
        model=torch.nn.Identity(),
        get_model_object=lambda name: torch.nn.Linear(2, 2),
        object_patches_backup={},
    )
    with pytest.raises(errors.DeltaConvError, match="Identity, Linear.*U-Nets"):
        in_pack(pack, "nodes.host.model.sites").find_sites(network)
    without = make_unet(
        transformer_depth=[0, 0], transformer_depth_output=[0, 0, 0, 0], transformer_depth_middle=-1
    )
    with pytest.raises(errors.DeltaConvError, match="has no self-attention"):
        in_pack(pack, "nodes.host.model.sites").find_sites(without)


def test_parts_that_were_compiled_one_by_one(pack, unet, pixart):
    """The wrappers stand in the network itself, around single transformer blocks."""
    find_sites = in_pack(pack, "nodes.host.model.sites").find_sites
    for model in (unet, pixart):
        expected = find_sites(model).sites
        network = model.model.diffusion_model
        lists = [m.transformer_blocks for m in network.modules() if hasattr(m, "transformer_blocks")]
        for blocks in lists or [network.blocks]:
            for number, block in enumerate(blocks):
                blocks[number] = torch.compile(block, backend="eager")
        assert [(s.id, s.path, s.channels) for s in find_sites(model).sites.values()] == [
            (s.id, s.path, s.channels) for s in expected.values()
        ]
        for blocks in lists or [network.blocks]:
            for number, block in enumerate(blocks):
                blocks[number] = block._orig_mod


class Cached(torch.nn.Module):
    """What other packs put around a network."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, *args, **call):
        return self.network(*args, **call)


@pytest.mark.parametrize("again", [False, True])
def test_a_network_inside_of_something_else_is_named(pack, unet, checkpoint, again):
    clone = unet.clone()
    network = Cached(clone.get_model_object("diffusion_model"))
    clone.add_object_patch("diffusion_model", torch.compile(network, backend="eager") if again else network)
    said = r"\(UNetModel\) stands inside Cached, which another node put around it .* put ΔConv before"
    with pytest.raises(ValueError, match=said):
        run_patch_node(pack, clone, checkpoint)
