"""How locality is told: names, table, CSV, picture, and the steps that are looked at."""

from __future__ import annotations

import builtins
import csv
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest

from deltaconv_core import BlockSpec, DeltaConvError
from deltaconv_core.locality import Recommendation, recommend
from deltaconv_core.locality.figure import draw_figure
from deltaconv_core.locality.sampled_steps import spread
from deltaconv_core.locality.table import rows, text, write_csv
from deltaconv_core.sites import short_name, site_channels
from testing.attention_maps import gaussian, locality, sink, uniform


@pytest.fixture(scope="module")
def layer():
    grid = (12, 16)
    return locality(
        grid, 0.7 * gaussian(grid, 1.0) + 0.2 * uniform(grid) + 0.1 * sink(grid, -1), uniform(grid)
    )


def layers_of(layer, architecture):
    return [replace(layer, site=site, channels=c) for site, c in site_channels(architecture).items()]


@pytest.mark.parametrize(
    ("steps", "looks", "at"),
    [(20, 4, [2, 7, 12, 17]), (3, 3, [0, 1, 2]), (2, 9, [0, 1]), (1, 1, [0]), (10, 1, [5]), (7, 2, [1, 5])],
)
def test_looks_are_spread_over_the_steps(steps, looks, at):
    assert spread(steps, looks) == at


@pytest.mark.parametrize(
    ("site", "name"),
    [
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn1", "down1.0"),
        ("up_blocks.0.attentions.2.transformer_blocks.10.attn1", "up0.2.10"),
        ("mid_block.attentions.0.transformer_blocks.0.attn1", "mid"),
        ("mid_block.attentions.0.transformer_blocks.3.attn1", "mid.3"),
        ("transformer_blocks.0.attn1", "0"),
        ("transformer_blocks.27.attn", "27"),
        ("transformer_blocks.3.attn2", "transformer_blocks.3.attn2"),
        ("single_transformer_blocks.30.attn", "single30"),
        ("noise_refiner.0.attn", "noise0"),
        ("layers.10.attn", "10"),
        ("something.else", "something.else"),
    ],
)
def test_short_names(site, name):
    assert short_name(site) == name


@pytest.mark.parametrize("architecture", ["sd15", "sdxl", "pixart_sigma"])
def test_short_names_are_all_different(architecture):
    sites = site_channels(architecture)
    assert len({short_name(site) for site in sites}) == len(sites)


def test_table(layer):
    layers = layers_of(layer, "sd15")
    advice = replace(recommend(layers, "sd15"), skip=(layers[3].site,))
    advice.kernel_sizes.pop(layers[3].site)
    lines = text(layers, advice).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:18]]
    assert cells[0] == ["layer", "tokens", "C", "heads", "ERF", "range", "no sinks", "high", "sinks"] + [
        "near", "flat", "rest", "K", "GFLOP", "ΔConv"
    ]  # fmt: skip
    assert set("".join(cells[1])) == set("-:")
    assert cells[2][:5] == ["down0.0", "12x16", "320", "2", str(layer.erf)] and cells[2][-3] == "3"
    assert cells[5][0] == "down1.1" and cells[5][-3::2] == ["-", "-"]
    assert len({len(line) for line in lines[:18]}) == 1
    assert "ΔConv in 15 of 16 layers" in lines[19] and lines[20] == "Every query was looked at."


def test_table_of_joint_attention_and_of_samples(layer):
    sampled = replace(layer, queries=100, outside=0.125, high_error=layer.high * 0 + 0.03)
    told = text([sampled], Recommendation("flux", skip=(layer.site,)))
    assert "other" in told.splitlines()[0] and "12.5%" in told.splitlines()[2]
    assert "100 queries drawn at random" in told and "part at most 0.03" in told
    assert "Recommended" not in told


def test_costs_in_the_table(layer):
    site = layers_of(layer, "sd15")[0]
    (row,) = rows([replace(site, grid=(64, 64))], Recommendation("sd15", {site.site: 9}))
    assert float(row["GFLOP"]) == pytest.approx((8 * 4096 * 320**2 + 4 * 4096**2 * 320) / 1e9, rel=0.01)
    spec = BlockSpec.lean(site.channels, 9)
    expected = (2 * 4096 * (spec.dim * spec.inter * 1.5) + 1.25 * 4096 * spec.inter * 2 * 81) / 1e9
    assert float(row["ΔConv"]) == pytest.approx(expected, rel=0.01)


def test_csv(layer, tmp_path):
    layers = layers_of(layer, "pixart_sigma")
    write_csv(layers, recommend(layers, "pixart_sigma"), tmp_path)
    with (tmp_path / "layers.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["site"] for row in table] == [one.site for one in layers]
    assert {row["K"] for row in table} == {"3"}
    with (tmp_path / "curves.csv").open(encoding="utf-8", newline="") as file:
        points = [row for row in csv.DictReader(file) if row["site"] == layers[5].site]
    assert [int(point["K"]) for point in points] == list(range(1, 32, 2))
    assert [float(point["mass"]) for point in points] == pytest.approx(layer.mass.tolist(), rel=1e-4)
    assert [float(head) for head in points[3]["mass_by_head"].split()] == pytest.approx(
        layer.mass_by_head[:, 3].tolist(), rel=1e-4
    )


# ---- the picture ----


@pytest.mark.parametrize("architecture", ["sd15", "sdxl", "pixart_sigma"])
def test_picture(layer, architecture):
    layers = layers_of(layer, architecture)
    picture = draw_figure(layers, recommend(layers, architecture), f"Self-attention of {architecture}")
    assert picture.dtype == np.uint8 and picture.shape[1:] == (1024, 3) and 900 < len(picture) < 1500
    assert picture.mean() < 80  # dark
    assert picture[:20].std() > 0 or picture[20:60].std() > 0  # a title


def test_one_layer_and_one_token(layer):
    tiny = locality((1, 1), uniform((1, 1)))
    for one in (layer, tiny):
        assert draw_figure([one], recommend([one], "unet-64x1"), "one").shape[1] == 1024


def test_what_is_drawn_is_what_is_there(layer):
    """Another kernel size, another curve or another map gives another picture; the same gives the same."""
    advice = Recommendation("unet-64x1", {layer.site: 5})
    picture = draw_figure([layer], advice, "t")
    assert np.array_equal(picture, draw_figure([layer], advice, "t"))
    for other in (
        ([layer], Recommendation("unet-64x1", {layer.site: 7})),
        ([layer], Recommendation("unet-64x1", {}, (layer.site,))),
        ([replace(layer, mass=layer.mass**2)], advice),
        ([replace(layer, high=layer.high**2)], advice),
        ([replace(layer, around=layer.around.flip(0))], advice),
    ):
        assert not np.array_equal(picture, draw_figure(*other, "t"))


def test_drawing_changes_nothing_global(layer):
    before = dict(mpl.rcParams)
    draw_figure([layer], recommend([layer], "unet-64x1"), "t")
    assert dict(mpl.rcParams) == before
    assert "matplotlib.pyplot" not in __import__("sys").modules or not mpl.pyplot.get_fignums()


def test_without_matplotlib(layer, monkeypatch):
    original = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(DeltaConvError, match="pip install matplotlib"):
        draw_figure([layer], Recommendation("x"), "t")


def test_nothing_to_draw():
    with pytest.raises(DeltaConvError, match="at least one layer"):
        draw_figure([], Recommendation("x"), "t")
