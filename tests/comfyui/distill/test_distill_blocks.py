"""Which blocks ΔConv Distill trains: sites, kernel sizes, recommendations, forms."""

from __future__ import annotations

import json

import pytest

from testing.comfy_distill import distil
from testing.comfy_models import (
    in_pack,
    sample,
)

pytestmark = pytest.mark.usefixtures("output")


def test_only_chosen_blocks(pack, unet):
    patched, checkpoint, *_ = distil(
        pack, unet, blocks="mid,up", kernel_sizes='{"up": 7, "up_blocks.1": 3}'
    ).args
    sizes = {id.split(".attentions")[0]: b.spec.kernel_size for id, b in checkpoint.blocks.items()}
    assert sizes == {"mid_block": 5, "up_blocks.0": 7, "up_blocks.1": 3}
    assert sample(patched).isfinite().all()


@pytest.mark.parametrize(
    ("kernel_sizes", "message"),
    [
        ("8", "odd kernel_size"),
        ("big", "expected kernel_sizes to be 'auto'"),
        ('{"down": "7"}', "expected kernel_sizes to be 'auto'"),
        ("[3]", "expected kernel_sizes to be 'auto'"),
        ("true", "expected kernel_sizes to be 'auto'"),
        ('{"nowhere": 7}', "'nowhere' matches no site"),
    ],
)
def test_bad_kernel_sizes(pack, unet, output, kernel_sizes, message):
    with pytest.raises(ValueError, match=message):
        distil(pack, unet, kernel_sizes=kernel_sizes)
    assert not output.exists()


def test_forms_of_blocks(pack, unet):
    lean, released = (
        {block.spec for block in distil(pack, unet, **values).args[1].blocks.values()}
        for values in ({}, {"form": "released"})
    )
    assert all(spec.context and spec.merge == "sum" for spec in lean)
    assert {(spec.ratio, spec.merge, spec.context) for spec in released} == {(0.5, "concat", False)}
    with pytest.raises(ValueError, match="lean, released, got 'fat'"):
        distil(pack, unet, form="fat")


def recommendation(**changes):
    """For `unet`, whose middle block and last level it leaves alone."""
    first, second, middle, _, last = (f"{place}.transformer_blocks.0.attn1" for place in PLACES)
    values = {
        "kind": "deltaconv-recommendation", "version": 1, "architecture": "unet-32x2-64x3",
        "kernel_sizes": {first: 3, second: 7}, "skip": [middle, last],
    }  # fmt: skip
    return json.dumps(values | changes)


PLACES = (
    "down_blocks.0.attentions.0", "down_blocks.1.attentions.0", "mid_block.attentions.0",
    "up_blocks.0.attentions.1", "up_blocks.1.attentions.1",
)  # fmt: skip


def test_a_recommendation(pack, unet):
    """Its sizes are taken, what it skips stays attention, and what it does not know is as ever."""
    patched, checkpoint, *_ = distil(pack, unet, kernel_sizes=recommendation()).args
    sizes = {id.split(".transformer")[0]: b.spec.kernel_size for id, b in checkpoint.blocks.items()}
    assert sizes == {PLACES[0]: 3, PLACES[1]: 7, PLACES[3]: 5}
    assert sample(patched).isfinite().all()
    only = distil(pack, unet, blocks="down", kernel_sizes=recommendation()).args[1]
    assert len(only.blocks) == 2


@pytest.mark.parametrize(
    ("changes", "blocks", "message"),
    [
        ({"architecture": "sd15"}, "all", "for sd15, but this model is unet-32x2-64x3"),
        ({"skip": ["nowhere.attn1"]}, "all", "1 sites that this model does not, first nowhere.attn1"),
        ({"version": 2}, "all", "version 2"),
        ({"kind": "other"}, "all", "recommendation of the kind"),
        ({"kernel_sizes": {f"{PLACES[0]}.transformer_blocks.0.attn1": 4}}, "all", "odd kernel_size"),
        ({}, "mid", "leaves all 1 chosen sites alone"),
    ],
)
def test_bad_recommendations(pack, unet, output, changes, blocks, message):
    with pytest.raises(ValueError, match=message):
        distil(pack, unet, blocks=blocks, kernel_sizes=recommendation(**changes))
    assert not output.exists()


def test_automatic_kernel_sizes(pack):
    """As the authors' where they published; as the demo's where the shape is the demo's."""
    automatic = in_pack(pack, "deltaconv_core.sites.choose_specs").automatic
    sites = in_pack(pack, "nodes.host.model.sites")
    core = in_pack(pack, "deltaconv_core.sites")
    found = sites.Sites({id: sites.Site(id, "", n, None) for id, n in core.site_channels("sdxl").items()})
    assert automatic(found.shape) == core.authors_specs("sdxl")
    demo = in_pack(pack, "nodes.host.demo.unet").load_demo_model(
        str(in_pack(pack, "demo.files").teacher_file())
    )
    sizes = {
        id.split(".attentions")[0]: spec.kernel_size
        for id, spec in automatic(sites.find_sites(demo).shape).items()
    }
    levels = {"down_blocks.0": 11, "down_blocks.1": 9, "down_blocks.2": 5, "mid_block": 5}
    assert sizes == levels | {"up_blocks.0": 5, "up_blocks.1": 9, "up_blocks.2": 11}
