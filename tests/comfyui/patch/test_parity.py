"""Published files give the authors' block's outputs in real networks: the benchmark's comparison in small."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import parity
from testing import authors_block


@pytest.mark.parametrize("name", parity.ARCHITECTURES)
def test_every_form_of_file(pack, name):
    rows = list(parity.compare(name, small=True))
    assert [(row.form, row.latent) for row in rows] == [
        (form.name, latent)
        for form in parity.ARCHITECTURES[name].forms
        for latent in parity.ARCHITECTURES[name].latents
    ]
    assert all(row.error <= parity.LIMIT for row in rows), rows
    assert all(row.without > 0.2 for row in rows), rows


def no_pool(weights):
    return weights | {"conv_pool.weight": torch.zeros_like(weights["conv_pool.weight"])}


def turned_kernels(weights):
    return {name: w.transpose(2, 3) if w.ndim == 4 else w for name, w in weights.items()}


def swapped_stages(weights):
    first, second = (f"gates.{i}.conv_spatial.weight" for i in range(2))
    return weights | {first: weights[second], second: weights[first]}


@pytest.mark.parametrize("spoil", [no_pool, turned_kernels, swapped_stages])
def test_another_block_is_noticed(pack, monkeypatch, spoil):
    block = authors_block.block
    monkeypatch.setattr(authors_block, "block", lambda w, x, form: block(spoil(w), x, form))
    row = next(parity.compare("pixart_sigma", small=True))
    assert row.error > 100 * parity.LIMIT


def test_base_weights_left_out_are_noticed(pack, monkeypatch):
    published = parity.published
    monkeypatch.setattr(parity, "published", lambda blocks, base, form: published(blocks, {}, form))
    row = next(parity.compare("sd15", small=True))
    assert row.error > 100 * parity.LIMIT


@pytest.mark.parametrize(("size", "target"), [(7, 3), (8, 4), (5, 5), (9, 20), (1, 1), (1, 6)])
def test_resizing_of_the_reference_is_torchs(size, target):
    line = torch.randn(1, 1, size, generator=torch.Generator().manual_seed(size))
    expected = torch.nn.functional.interpolate(line, target, mode="linear")
    assert torch.allclose(line @ authors_block.bilinear(size, target, size / target).T, expected, atol=1e-6)
    pooled = torch.nn.functional.adaptive_avg_pool1d(line, target)
    assert torch.allclose(line @ authors_block.averages(size, target).T, pooled, atol=1e-6)


def test_a_miss_is_told_by_the_exit_status(monkeypatch, capsys):
    rows = [parity.Row("sd15", "release", (3, 5), error, 0.5, 1.0) for error in (1e-5, float("nan"))]
    monkeypatch.setattr(parity, "compare", lambda name, small: rows)
    monkeypatch.setattr(sys, "argv", ["parity.py", "--architecture", "sd15"])
    assert parity.main() == 1
    assert "1 of 2 comparisons above 0.0001" in capsys.readouterr().out
