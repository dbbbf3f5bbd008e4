"""Every form of the authors' files, written from an independent block, gives that block's output back."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from deltaconv_core import (
    BlockSpec,
    Checkpoint,
    CheckpointError,
    DeltaConvBlock,
    load_checkpoint,
    save_checkpoint,
)
from deltaconv_core.cli import main
from deltaconv_core.sites import ARCHITECTURES, Level, UNet, authors_specs
from testing.authors_block import conv2d, earlier, release
from testing.authors_twin import DOWN, MID, RESNET, Twin, assert_same_outputs, write


@pytest.fixture
def path(tmp_path):
    return tmp_path / "published.safetensors"


UNET = {DOWN: (8, 7), MID: (16, 3)}
PIXART = {f"transformer_blocks.{i}": (12, 13) for i in range(3)}


@pytest.mark.parametrize("prefix", ["", "denoiser.", "unet.", "base:", "base_ema:", "base_ema:denoiser."])
@pytest.mark.parametrize("layout", [release, conv2d])
@pytest.mark.parametrize(
    ("places", "gate", "architecture"), [(UNET, "simple", "unet-8x1-16x1"), (PIXART, "sigmoid", "dit-12x3")]
)
def test_two_stages_by_what_the_authors_use(path, places, gate, architecture, layout, prefix):
    twins = {place: Twin(*shape, seed=i) for i, (place, shape) in enumerate(places.items())}
    checkpoint = load_checkpoint(write(path, twins, layout, prefix))
    assert checkpoint.architecture == architecture
    assert list(checkpoint.blocks) == sorted(f"{place}.attn1" for place in places)
    for place, (dim, kernel_size) in places.items():
        assert checkpoint.blocks[f"{place}.attn1"].spec == BlockSpec(dim, kernel_size, gate=gate)
    assert_same_outputs(checkpoint, twins, gate, (1, 0.5))


@pytest.mark.parametrize("layout", [release, conv2d])
@pytest.mark.parametrize("projection_bias", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_biases_and_numbers_of_stages(path, layout, stages, bias, projection_bias):
    twins = {"transformer_blocks.0": Twin(12, 5, stages, bias, projection_bias)}
    scales = (1, 1 / 2, 1 / 4, 2 / 3)[:stages]
    checkpoint = load_checkpoint(write(path, twins, layout), scales=scales)
    spec = checkpoint.blocks["transformer_blocks.0.attn1"].spec
    assert spec == BlockSpec(12, 5, scales, "sigmoid", depthwise_bias=bias)
    assert_same_outputs(checkpoint, twins, "sigmoid", scales)


def test_blocks_come_in_the_order_of_the_network(path):
    twins = {f"transformer_blocks.{i}": Twin(4, 1) for i in range(12)}
    sites = list(load_checkpoint(write(path, twins, release)).blocks)
    assert sites == [f"transformer_blocks.{i}.attn1" for i in range(12)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("places", [UNET, PIXART])
def test_the_earlier_block(path, places, bias):
    twins = {place: Twin(*shape, bias=bias, seed=i) for i, (place, shape) in enumerate(places.items())}
    checkpoint = load_checkpoint(write(path, twins, earlier))
    for place, (dim, kernel_size) in places.items():
        expected = BlockSpec(dim, kernel_size, gate="sigmoid", pooling="bilinear", depthwise_bias=bias)
        assert checkpoint.blocks[f"{place}.attn1"].spec == expected
    assert_same_outputs(checkpoint, twins, "sigmoid", (1, 0.5), "bilinear")


@pytest.mark.parametrize("told_by", ["argument", "header", "argument over header"])
@pytest.mark.parametrize("layout", [release, conv2d, earlier])
def test_gate_scales_and_pooling_from_elsewhere(path, layout, told_by):
    twins = {DOWN: Twin(8, 5)}
    form = {"gate": "sigmoid", "scales": (0.5, 1), "pooling": "average"}
    header = {**form, "scales": json.dumps(form["scales"])} if told_by == "header" else {}
    if told_by == "argument over header":
        header = {"gate": "simple", "scales": "[1, 0.25]", "pooling": "bilinear"}
    write(path, twins, layout, header={"format": "pt", "step": "7", **header})
    checkpoint = load_checkpoint(path, **({} if told_by == "header" else form))
    assert_same_outputs(checkpoint, twins, "sigmoid", (0.5, 1), "average")
    assert checkpoint.metadata == {"step": "7", **header}


def test_three_scales_that_nobody_told_are_assumed_aloud(path, caplog):
    twins = {"transformer_blocks.0": Twin(12, 5, stages=3)}
    write(path, twins, release)
    with caplog.at_level(logging.WARNING):
        checkpoint = load_checkpoint(path)
    assert "1, 1/2, 1/3" in caplog.text and str(path) in caplog.text
    assert "1/4" in checkpoint.metadata["assumed"]
    assert_same_outputs(checkpoint, twins, "sigmoid", (1, 1 / 2, 1 / 3))
    caplog.clear()
    assert "assumed" not in load_checkpoint(path, scales=(1, 0.5, 0.25)).metadata and not caplog.text


def test_first_convolutions_of_resnets_are_base_weights(path):
    extra = {f"{RESNET}.weight": torch.randn(8, 4, 3, 3), f"{RESNET}.bias": torch.randn(8)}
    checkpoint = load_checkpoint(write(path, {DOWN: Twin(8, 5)}, release, "denoiser.", extra=extra))
    assert checkpoint.base_weights.keys() == extra.keys()
    assert all(torch.equal(checkpoint.base_weights[name], extra[name]) for name in extra)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept(path, dtype):
    twin = Twin(8, 5, projection_bias=False)
    twin.w = {name: tensor.to(dtype) for name, tensor in twin.w.items()}
    (block,) = load_checkpoint(write(path, {DOWN: twin}, release)).blocks.values()
    assert {tensor.dtype for tensor in block.state_dict().values()} == {dtype}


TINY = UNet((Level(8, (1,), 5), Level(16, (2,), 3)), Level(16, (1,), 3), (Level(16),), context_dim=32)


def test_a_known_architecture_is_named_and_has_all_its_sites(path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "tiny", TINY)
    specs = authors_specs("tiny")
    twins = {site.removesuffix(".attn1"): Twin(s.dim, s.kernel_size) for site, s in specs.items()}
    checkpoint = load_checkpoint(write(path, twins, release))
    assert checkpoint.architecture == "tiny"
    assert {site: block.spec for site, block in checkpoint.blocks.items()} == specs
    del twins[MID]
    with pytest.raises(CheckpointError, match=rf"3 of the 4 blocks of tiny; missing: {MID}.attn1"):
        load_checkpoint(write(path, twins, release))


def edited(**changes):
    """Extra tensors over those of a released block at DOWN; None removes one."""
    return {f"{DOWN}.conv1.{name.replace('__', '.')}": tensor for name, tensor in changes.items()}


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ({"optimizer.step": torch.ones(1)}, ["1 tensors", "optimizer.step", "expected", "conv1."]),
        (edited(norm__weight=torch.ones(8)), [f"{DOWN}.conv1.norm.weight"]),
        ({f"{DOWN}.attn1.to_q.weight": torch.ones(8, 8)}, [f"{DOWN}.attn1.to_q.weight"]),
        ({"down_blocks.0.resnets.0.conv2.weight": torch.ones(8, 8, 3, 3)}, ["resnets.0.conv2.weight"]),
        ({f"{RESNET}.weight": torch.ones(8, 8)}, [f"{RESNET}.weight has shape (8, 8), expected", "3, 3)"]),
        ({f"{RESNET}.bias": torch.ones(8, 1)}, [f"{RESNET}.bias has shape (8, 1), expected (channels,)"]),
        (
            {f"unet.{DOWN}.conv1.conv_up.weight": torch.ones(4, 8)},
            [f"{DOWN}.conv1.conv_up.weight more than once"],
        ),
        (edited(conv_up__weight=None), ["no conv_up.weight"]),
        (edited(conv_out__weight=None), ["lack", "conv_out.weight"]),
        (
            edited(conv_up__weight=torch.ones(4, 8, 3, 3)),
            ["(4, 8, 3, 3), expected (out, in) or (out, in, 1, 1)"],
        ),
        (edited(conv_up__weight=torch.ones(4, 0)), ["dim"]),
        (edited(conv_up__weight=torch.ones(0, 8)), ["expected (K, K, 0)"]),
        (edited(conv_up__weight=torch.ones(())), ["(), expected (out, in)"]),
        (edited(gates__0__conv_spatial__weight=torch.ones(())), ["(), expected (K, K, 4)"]),
        (edited(conv_up__weight=torch.ones(4)), ["conv_up.weight", "(4,), expected (out, in)"]),
        (edited(conv_out__weight=torch.ones(8, 6)), ["conv_out.weight has shape (8, 6), expected (8, 4)"]),
        (edited(conv_pool__bias=torch.ones(4)), ["conv_pool.bias has shape (4,), expected (8,)"]),
        (
            edited(gates__0__conv_spatial__weight=torch.ones(4, 5, 5)),
            ["(4, 5, 5), expected (K, K, 4) or (4, 1, K, K)"],
        ),
        (edited(gates__0__conv_spatial__weight=torch.ones(4, 2, 5, 5)), ["(4, 2, 5, 5), expected"]),
        (edited(gates__0__conv_spatial__weight=torch.ones(5, 3, 4)), ["(5, 3, 4), expected"]),
        (edited(gates__0__conv_spatial__weight=torch.ones(4)), ["(4,), expected"]),
        (
            edited(gates__1__conv_spatial__weight=torch.ones(7, 7, 4)),
            ["has shape (4, 1, 7, 7), expected (4, 1, 5, 5)"],
        ),
        (edited(gates__0__conv_spatial__bias=torch.ones(4)), ["lack", "gates.1.conv_spatial.bias"]),
        (
            edited(gates__3__conv_spatial__weight=torch.ones(5, 5, 4)),
            ["lack", "gates.2.conv_spatial.weight", "gates.3"],
        ),
        (
            edited(conv_spatial__weight=torch.ones(4, 1, 5, 5)),
            ["of two forms at once"],
        ),
        (edited(conv_up__weight=torch.full((4, 8), float("nan"))), ["conv_up.weight", "32 NaN"]),
    ],
)
def test_refuses_by_name(path, edits, words):
    tensors = {f"{DOWN}.conv1.{name}": tensor for name, tensor in release(Twin(8, 5).w).items()}
    tensors = {name: tensor for name, tensor in {**tensors, **edits}.items() if tensor is not None}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


def test_refuses_even_kernels_and_half_present_biases(path):
    with pytest.raises(CheckpointError, match="odd kernel_size .* got 4"):
        load_checkpoint(write(path, {DOWN: Twin(8, 4)}, release))
    twins = {DOWN: Twin(8, 5), MID: Twin(8, 5, projection_bias=False)}
    with pytest.raises(
        CheckpointError, match=f"conv_up.bias is missing at {MID}.attn1 but not at other blocks"
    ):
        load_checkpoint(write(path, twins, release))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"gate": "relu"}, "gate to be one of .* got 'relu'"),
        ({"pooling": "max"}, "pooling to be one of .* got 'max'"),
        ({"scales": (1.0, 0.5, 0.25)}, r"2 stages and needs as many scales, got \(1.0, 0.5, 0.25\)"),
        ({"scales": (1.0, 7)}, "0 < scale <= 1"),
    ],
)
def test_refuses_settings_that_do_not_fit(path, form, message):
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(write(path, {DOWN: Twin(8, 5)}, release), **form)


@pytest.mark.parametrize("scales", ["{", "1", "[[1], 2]", '["a", "b"]'])
def test_refuses_a_header_without_sense(path, scales):
    with pytest.raises(CheckpointError, match="scale"):
        load_checkpoint(write(path, {DOWN: Twin(8, 5)}, release, header={"scales": scales}))


def test_settings_win_over_our_own_file_too(path):
    twin = Twin(8, 5)
    block = DeltaConvBlock(BlockSpec(8, 5))
    block.load_state_dict(twin.w)
    save_checkpoint(Checkpoint("unet-8x1", {f"{DOWN}.attn1": block}), path)
    checkpoint = load_checkpoint(path, gate="sigmoid", scales=(1, 0.25), pooling="bilinear")
    assert checkpoint.blocks[f"{DOWN}.attn1"].spec == BlockSpec(
        8, 5, (1, 0.25), "sigmoid", pooling="bilinear"
    )
    with pytest.raises(CheckpointError, match=r"2 stages and needs as many scales, got \(1,\)"):
        load_checkpoint(path, scales=(1,))


def test_convert_writes_our_own_form(path, tmp_path, capsys):
    twins = {DOWN: Twin(8, 5, stages=3), MID: Twin(16, 3, stages=3)}
    extra = {f"{RESNET}.weight": torch.randn(8, 4, 3, 3), f"{RESNET}.bias": torch.randn(8)}
    write(path, twins, conv2d, "base_ema:", {"step": "7"}, extra)
    out = str(tmp_path / "own.safetensors")
    assert main(["convert", str(path), out, "--gate", "sigmoid", "--scales", "1, 1/2,0.25"]) == 0
    assert capsys.readouterr().out == f"wrote 2 blocks of unet-8x1-16x1 to {out}\n"
    checkpoint = load_checkpoint(out)
    assert_same_outputs(checkpoint, twins, "sigmoid", (1, 0.5, 0.25))
    assert checkpoint.metadata == {"step": "7"} and checkpoint.base_weights.keys() == extra.keys()
    assert main(["convert", out, out, "--dtype", "bfloat16"]) == 0
    cast = load_checkpoint(out)
    tensors = [t for block in cast.blocks.values() for t in block.state_dict().values()]
    assert {t.dtype for t in [*tensors, *cast.base_weights.values()]} == {torch.bfloat16}
    assert cast.blocks[f"{DOWN}.attn1"].spec == checkpoint.blocks[f"{DOWN}.attn1"].spec


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (
            ["--dtype", "float16"],
            2,
            "conv_up.bias has values up to 1e+06, too large for float16; choose bfloat16",
        ),
        (["--scales", "1"], 2, "2 stages and needs as many scales"),
        (["--scales", "1,x"], None, "numbers like 1,1/2,1/3, got '1,x'"),
        (["--scales", "1,1/0"], None, "got '1,1/0'"),
        (["--gate", "relu"], None, "relu"),
    ],
)
def test_convert_refuses(path, tmp_path, capsys, options, status, message):
    twin = Twin(8, 5)
    twin.w["conv_up.bias"][0] = 1e6
    arguments = [
        "convert",
        str(write(path, {DOWN: twin}, release)),
        str(tmp_path / "own.safetensors"),
        *options,
    ]
    if status is None:
        with pytest.raises(SystemExit):
            main(arguments)
    else:
        assert main(arguments) == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "own.safetensors").exists()
