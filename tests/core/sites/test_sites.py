"""Site tables of the known architectures, their recognition, and the selection language."""

from __future__ import annotations

import pytest

from deltaconv_core import DeltaConvError
from deltaconv_core.sites import ARCHITECTURES, authors_specs, identify, level_of, select, site_channels

SD15 = tuple(site_channels("sd15"))


@pytest.mark.parametrize(
    ("architecture", "count", "millions"),
    [
        ("sd15", 16, 25.39),
        ("sd21", 16, 25.39),
        ("sdxl", 70, 211.27),
        ("pixart_sigma", 28, 79.85),
        ("ssd1b", 34, None),
    ],
)
def test_tables_have_the_published_size(architecture, count, millions):
    specs = authors_specs(architecture)
    assert len(specs) == count
    assert {site: spec.dim for site, spec in specs.items()} == site_channels(architecture)
    if millions is not None:
        total = sum(spec.num_parameters for spec in specs.values())
        assert total / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize(
    ("architecture", "site", "channels", "kernel_size"),
    [
        ("sd15", "down_blocks.0.attentions.1.transformer_blocks.0.attn1", 320, 7),
        ("sd15", "mid_block.attentions.0.transformer_blocks.0.attn1", 1280, 3),
        ("sd15", "up_blocks.3.attentions.2.transformer_blocks.0.attn1", 320, 11),
        ("sdxl", "down_blocks.2.attentions.1.transformer_blocks.9.attn1", 1280, 7),
        ("sdxl", "up_blocks.1.attentions.2.transformer_blocks.1.attn1", 640, 13),
        ("ssd1b", "up_blocks.0.attentions.2.transformer_blocks.9.attn1", 1280, 9),
        ("pixart_sigma", "transformer_blocks.27.attn1", 1152, 13),
    ],
)
def test_single_sites(architecture, site, channels, kernel_size):
    spec = authors_specs(architecture)[site]
    assert (spec.dim, spec.kernel_size) == (channels, kernel_size)
    assert spec.gate == ("sigmoid" if architecture == "pixart_sigma" else "simple")


@pytest.mark.parametrize(
    ("site", "level"),
    [
        ("down_blocks.0.attentions.1.transformer_blocks.0.attn1", 0),
        ("down_blocks.2.attentions.0.transformer_blocks.0.attn1", 2),
        ("mid_block.attentions.0.transformer_blocks.0.attn1", 3),
        ("up_blocks.0.attentions.0.transformer_blocks.0.attn1", 3),
        ("up_blocks.3.attentions.2.transformer_blocks.0.attn1", 0),
        ("transformer_blocks.7.attn1", 1),
    ],
)
def test_level_of_a_site_in_a_network_of_four(site, level):
    assert level_of(site, 4) == level


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_identifies_every_known_architecture(architecture):
    context = getattr(ARCHITECTURES[architecture], "context_dim", None)
    shuffled = dict(reversed(site_channels(architecture).items()))
    assert identify(shuffled, context_dim=context) == architecture


def test_context_tells_sd21_from_sd15():
    assert identify(site_channels("sd15")) == "sd15"
    assert identify(site_channels("sd15"), context_dim=1024) == "sd21"
    assert identify(site_channels("sd15"), context_dim=64) == "unet-320x5-640x5-1280x6"


@pytest.mark.parametrize(
    ("sites", "name"),
    [
        ({"down_blocks.0.attentions.0.transformer_blocks.0.attn1": 64}, "unet-64x1"),
        (
            {"mid_block.attentions.0.transformer_blocks.0.attn1": 128, "up_blocks.0.x.attn1": 64},
            "unet-64x1-128x1",
        ),
        ({"transformer_blocks.0.attn1": 64, "transformer_blocks.1.attn1": 64}, "dit-64x2"),
    ],
)
def test_names_other_models_by_their_shape(sites, name):
    assert identify(sites) == name


def test_a_model_without_sites_is_refused():
    with pytest.raises(DeltaConvError, match="no self-attention that"):
        identify({})
    with pytest.raises(DeltaConvError, match="unknown architecture 'flux'; known are sd15"):
        site_channels("flux")


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("all", 16),
        ("down", 6),
        ("mid,up", 10),
        ("all,-mid", 15),
        ("-mid", 15),
        (" up , -up_blocks.3 ", 6),
        ("up_blocks.1", 3),
        ("up_blocks.*", 9),
        ("*.attentions.0.*", 7),
        ("down_blocks.[01].*", 4),
        (SD15[3], 1),
    ],
)
def test_selects(pattern, count):
    chosen = select(pattern, SD15)
    assert len(chosen) == count
    assert list(chosen) == [site for site in SD15 if site in chosen]


def test_a_number_is_not_the_beginning_of_another():
    assert select("transformer_blocks.2", site_channels("pixart_sigma")) == ("transformer_blocks.2.attn1",)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("middle", "'middle' matches no site.*down_blocks.0.attentions.0"),
        ("dwn", "'dwn' matches no site, did you mean 'down'[?];"),
        ("up_block.1", "'up_block.1' matches no site, did you mean 'up_blocks.1'[?];"),
        ("all,-side", "'side' matches no site"),
        ("down,-down", "'down,-down' selects nothing"),
        ("-", "'' matches no site"),
        ("", "'' selects nothing; use 'all'"),
    ],
)
def test_refuses_selections(pattern, message):
    with pytest.raises(DeltaConvError, match=message):
        select(pattern, SD15)


def test_a_part_that_the_model_does_not_have():
    with pytest.raises(DeltaConvError, match="'mid' matches no site"):
        select("mid", site_channels("ssd1b"))
