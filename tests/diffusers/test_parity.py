"""The same file gives the same network in ComfyUI and in diffusers: the benchmark's comparison in small."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import diffusers_features, diffusers_parity, parity
from deltaconv_core import Checkpoint, save_checkpoint
from deltaconv_core import diffusers as adapter
from deltaconv_core.diffusers.hooks import TellChoice
from deltaconv_core.diffusers.sites import find_sites
from deltaconv_core.mixers.hybrid import HybridMixer, HybridSpec
from deltaconv_core.sites.sampling_range import SamplingRange
from testing.comfy_models import in_pack, patch
from testing.compare import largest_error


@pytest.mark.parametrize("name", diffusers_parity.ARCHITECTURES)
def test_both_hosts_agree(pack, name):
    rows = list(diffusers_parity.compare(name, small=True))
    assert [row.state for row in rows] == ["attention"] * 2 + ["ΔConv"] * 2 + ["removed"] * 2
    assert all(row.error <= parity.LIMIT and not row.missed for row in rows), rows
    assert all((row.change > 0.2) == (row.state == "ΔConv") for row in rows), rows


def other_blocks(patch, model, path):
    """One block less."""
    return patch(model, path, blocks="-transformer_blocks.0")


def without_base_weights(patch, model, path):
    return patch(model, path, base_weights_strength=0.0)


@pytest.mark.parametrize(("name", "spoil"), [("pixart_sigma", other_blocks), ("sd15", without_base_weights)])
def test_another_network_is_noticed(pack, monkeypatch, name, spoil):
    patch = adapter.apply
    monkeypatch.setattr(adapter, "apply", lambda model, path: spoil(patch, model, path))
    rows = [row for row in diffusers_parity.compare(name, small=True) if row.state == "ΔConv"]
    assert all(row.error > 100 * parity.LIMIT and row.missed for row in rows), rows


def test_traces_are_noticed(pack, monkeypatch):
    monkeypatch.setattr(adapter, "remove", lambda model: None)
    rows = list(diffusers_parity.compare("pixart_sigma", small=True))
    assert [row.missed for row in rows] == [False] * 4 + [True] * 2


def test_a_miss_is_told_by_the_exit_status(monkeypatch, capsys):
    rows = [diffusers_parity.Row("sd15", (3, 5), "ΔConv", error, 0.5) for error in (1e-5, float("nan"))]
    monkeypatch.setattr(diffusers_parity, "compare", lambda name, small: rows)
    monkeypatch.setattr(sys, "argv", ["diffusers_parity.py", "--architecture", "sd15"])
    assert diffusers_parity.main() == 1
    assert "1 of 2 comparisons above 0.0001" in capsys.readouterr().out


def test_percents_mean_the_same_noise_in_both_hosts(comfy_host):
    import comfy.model_sampling

    sampling = comfy.model_sampling.ModelSamplingDiscrete()
    choice = TellChoice(SamplingRange(), 1000, None, None)
    for percent in torch.linspace(0.01, 1, 34).tolist():
        sigma = torch.tensor(sampling.percent_to_sigma(percent))
        assert abs(sampling.timestep(sigma).item() - choice.timestep_at(percent)) <= 0.5
    assert sampling.percent_to_sigma(0) > sampling.sigma_max and choice.timestep_at(0) > 999


@pytest.mark.slow
@pytest.mark.parametrize("name", diffusers_parity.ARCHITECTURES)
def test_features(name):
    rows = {row.feature: row for row in diffusers_features.compare(name, small=True, backend="eager")}
    assert not any(row.missed for row in rows.values())
    assert rows["ΔConv"].difference > 1e-2 and rows["its LoRA"].difference > 1e-2
    assert set(rows) == {"ΔConv", "offloaded", "compiled", "removed", "its LoRA", "LoRA"}


@pytest.mark.parametrize("name", diffusers_parity.ARCHITECTURES)
def test_both_hosts_agree_on_hybrid_mixers(pack, name, tmp_path):
    """The same file of hybrid mixers in both, Nyström's correction at some sites and kernels at others."""
    torch.manual_seed(0)
    architecture = diffusers_parity.ARCHITECTURES[name]
    with torch.no_grad():
        theirs = diffusers_parity.diffusers_model(name, architecture, True)
        host = diffusers_parity.comfyui_model(theirs, architecture, True)
    inputs = {
        latent: diffusers_parity.both_inputs(theirs, architecture, True, latent)
        for latent in diffusers_parity.LATENTS[name][True]
    }
    found, mixers = find_sites(theirs), {}
    for number, (site, attention) in enumerate(found.attentions.items()):
        local = {"landmarks": 16, "nystrom": "none", "kernel_size": 5, "scales": (1.0, 0.5), "mean": True}
        spec = HybridSpec(
            found.channels[site],
            attention.heads,
            attention.to_q.out_features // attention.heads,
            **(local if number % 2 else {"landmarks": 9}),
        )
        mixers[site] = HybridMixer(spec).requires_grad_(False)
        for parameter in mixers[site].parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape) + (parameter.ndim == 1))
    path = tmp_path / "hybrid.safetensors"
    save_checkpoint(Checkpoint(found.architecture, mixers), path)
    before = diffusers_parity.Outputs(host, theirs, inputs)
    patched = patch(pack, host, in_pack(pack, "deltaconv_core").load_checkpoint(path))
    adapter.apply(theirs, path)
    for latent, (given, other) in inputs.items():
        own, wanted = as_sampled(patched, given), diffusers_parity.run(theirs, other)
        assert largest_error(own, wanted) <= parity.LIMIT
        assert largest_error(wanted, before.theirs[latent]) > 1e-3
    parity.unload()
    adapter.remove(theirs)
    rows = list(diffusers_parity.Outputs(host, theirs, inputs).rows(name, "removed", before))
    assert not any(row.missed for row in rows), rows


def converted_kinds():
    """Architectures of few channels: two published ones, and SD 2.1, with heads of 64 channels."""
    known = diffusers_parity.ARCHITECTURES
    sd21 = {"num_heads": -1, "num_head_channels": 64, "use_linear_in_transformer": True, "context_dim": 1024}
    return {
        "sdxl": replace(known["sdxl"], small=known["sdxl"].small | {"adm_in_channels": 2816}),
        "sd21": replace(
            known["sd15"],
            host_class="SD20",
            config=known["sd15"].config | sd21,
            small={"model_channels": 64, "context_dim": 16},
        ),
        "pixart_sigma": known["pixart_sigma"],
    }


@pytest.mark.parametrize("name", converted_kinds())
def test_what_is_converted_in_comfyui_is_the_same_in_diffusers(pack, name, tmp_path, monkeypatch):
    """Through a file. Every mixer counts as faster than attention."""

    def alternate(runs, device, repeats, check=lambda: None):
        return {key: [0.01 * (int(key) or 20)] for key in runs}

    monkeypatch.setattr(in_pack(pack, "deltaconv_core.distill.conversion"), "alternate", alternate)
    architecture, latent = converted_kinds()[name], (46, 38) if name == "pixart_sigma" else (33, 27)
    torch.manual_seed(0)
    with torch.no_grad():
        theirs = diffusers_parity.diffusers_model(name, architecture, True)
        host = diffusers_parity.comfyui_model(theirs, architecture, True)
    given, other = diffusers_parity.both_inputs(theirs, architecture, True, latent)
    before = parity.run_loaded(host, given), diffusers_parity.run(theirs, other)
    positive = [[torch.randn(1, 8, 16), {"pooled_output": torch.randn(1, 1280)}]]
    with torch.inference_mode():
        node = in_pack(pack, "nodes.convert_model").ConvertModel
        size = {"samples": torch.zeros(1, 4, *latent)}
        patched, checkpoint, _ = node.execute(host, positive, size, "quality", 0.9, 0.5, 4, 1).args
    assert checkpoint.blocks
    core = in_pack(pack, "deltaconv_core")
    core.save_checkpoint(checkpoint, tmp_path / "hybrid.safetensors")
    loaded = patch(pack, host, core.load_checkpoint(tmp_path / "hybrid.safetensors"))
    adapter.apply(theirs, tmp_path / "hybrid.safetensors")
    wanted = diffusers_parity.run(theirs, other)
    assert largest_error(wanted, before[1]) > 1e-4
    for model in (patched, loaded):
        assert largest_error(as_sampled(model, given), wanted) <= parity.LIMIT
    parity.unload()
    adapter.remove(theirs)
    assert torch.equal(parity.run_loaded(host, given), before[0])
    assert torch.equal(diffusers_parity.run(theirs, other), before[1])


def as_sampled(model, inputs):
    """The network's output, called the way that ComfyUI's samplers do: through the MODEL's wrappers."""
    (wrapper,) = model.wrappers["apply_model"]["deltaconv"]

    class Executor:
        class_obj = model.model

        def __call__(self, x, sigmas):
            return parity.run_loaded(model, inputs)

    return wrapper(Executor(), inputs["x"], torch.ones(len(inputs["x"])))
