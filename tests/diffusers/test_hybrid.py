"""Hybrid mixers on diffusers models: between the attention's own projections, which still act."""

from __future__ import annotations

from pathlib import Path
from types import FunctionType

import pytest
import torch

from deltaconv_core import Checkpoint, DeltaConvError, load_checkpoint, save_checkpoint
from deltaconv_core.diffusers import applied, apply, remove
from deltaconv_core.diffusers.sites import find_sites
from deltaconv_core.diffusers.watch import watched
from deltaconv_core.distill.hybrid import FitSettings, HybridFit, fit_hybrids
from deltaconv_core.mixers.hybrid import HybridMixer, HybridSpec
from testing.diffusers_models import KINDS, call, make, make_pixart_pipeline, run

EXACT = {"landmarks": 2**14, "nystrom": "none"}
HYBRID = {"landmarks": 9, "nystrom": "none", "kernel_size": 3, "mean": True}


def hybrids(model, sites=None, **spec):
    """Hybrid mixers with random parameters; those of `EXACT` keep what they start with."""
    found = find_sites(model)
    mixers = {}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for site, attention in found.attentions.items():
            width = attention.to_q.out_features // attention.heads
            mixers[site] = HybridMixer(HybridSpec(found.channels[site], attention.heads, width, **spec))
            if "kernel_size" in spec:
                for parameter in mixers[site].requires_grad_(False).parameters():
                    parameter.normal_(std=0.3)
    kept = {site: "it is cheap here" for site in mixers if sites is not None and site not in sites}
    return Checkpoint(found.architecture, {s: m for s, m in mixers.items() if s not in kept}, kept=kept)


@pytest.fixture(params=KINDS)
def model(request):
    return make(request.param)


def test_with_a_landmark_for_each_token_nothing_changes(model):
    before = run(model)
    apply(model, hybrids(model, **EXACT))
    torch.testing.assert_close(run(model), before, rtol=1e-4, atol=1e-4)
    remove(model)
    assert torch.equal(run(model), before)


def test_applied_says_that_they_are_hybrids(model):
    checkpoint = hybrids(model, **HYBRID)
    apply(model, checkpoint)
    assert applied(model).mixer == "hybrid"
    assert applied(model).specs == {site: mixer.spec for site, mixer in checkpoint.blocks.items()}


@pytest.mark.parametrize("size", [(16, 12), (24, 8)])
def test_equals_the_mixer_put_in_by_hand(model, size):
    """Every site's own processor, asked for q, k and v by hand."""
    checkpoint = hybrids(model, **HYBRID)
    apply(model, checkpoint)
    own = run(model, size)
    remove(model)
    assert not torch.allclose(own, run(model, size), atol=1e-3)
    grids = {}

    def processor(site):
        def process(attn, x, *args, **kwargs):
            parts = [
                layer(x).unflatten(2, (attn.heads, -1)).transpose(1, 2)
                for layer in (attn.to_q, attn.to_k, attn.to_v)
            ]
            y = checkpoint.blocks[site](*parts, grids[x.shape[1]])
            return attn.to_out[0](y.transpose(1, 2).flatten(2))

        return process

    patch = 2 if "caption_channels" in model.config else 1
    for level in range(4):
        h, w = size[0] // patch >> level, size[1] // patch >> level
        grids[h * w] = (h, w)
    found = find_sites(model)
    for site, attention in found.attentions.items():
        attention.processor = processor(site)
    torch.testing.assert_close(run(model, size), own, rtol=1e-4, atol=1e-4)


def test_travels_through_a_file_and_leaves_sites_alone(model, tmp_path):
    sites = list(find_sites(model).attentions)
    checkpoint = hybrids(model, sites[:1], **HYBRID)
    save_checkpoint(checkpoint, tmp_path / "hybrid.safetensors")
    apply(model, checkpoint)
    wanted = run(model)
    remove(model)
    told = apply(model, tmp_path / "hybrid.safetensors")
    assert torch.equal(run(model), wanted)
    assert f"A hybrid mixer stands in for 1 of {len(sites)}" in told.lines[0]
    assert f"Attention stays at {sites[1]}: it is cheap here." in told.lines
    assert not load_checkpoint(tmp_path / "hybrid.safetensors").blocks.keys() & set(sites[1:])


@pytest.mark.parametrize("layer", ["to_q", "to_k", "to_v", "to_out.0"])
def test_what_is_put_on_the_projections_acts(layer, monkeypatch):
    """As LoRA does: a layer that calls the original and adds something."""
    model = make("sd")
    apply(model, hybrids(model, **HYBRID))
    before = run(model)
    attention = next(iter(find_sites(model).attentions.values()))
    own = attention.get_submodule(layer)

    class Added(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.own = own
            self.weight = own.weight

        def forward(self, x):
            return self.own(x) + 30 * x

    parent, _, name = layer.rpartition(".")
    monkeypatch.setitem(attention.get_submodule(parent)._modules, name, Added())
    assert (run(model) - before).abs().max() > 1e-4
    monkeypatch.undo()
    assert torch.equal(run(model), before)


def test_lora_acts_without_a_warning():
    from peft import LoraConfig

    model = make("sd")
    model.add_adapter(LoraConfig(r=2, target_modules=["attn1.to_q", "attn1.to_v"], init_lora_weights=False))
    told = apply(model, hybrids(model, **HYBRID))
    assert not told.warnings
    with_lora = run(model)
    model.disable_adapters()
    assert (run(model) - with_lora).abs().max() > 1e-3


def test_fused_projections_give_the_same():
    model = make("sd")
    apply(model, hybrids(model, **HYBRID))
    before = run(model)
    model.fuse_qkv_projections()
    torch.testing.assert_close(run(model), before, rtol=1e-4, atol=1e-4)


def test_a_range_runs_attention_outside():
    model = make("sd")
    plain = run(model, timestep=500), run(model, timestep=50)
    apply(model, hybrids(model, **HYBRID), end_percent=0.6)
    assert not torch.allclose(run(model, timestep=500), plain[0], atol=1e-3)
    assert torch.equal(run(model, timestep=50), plain[1])


def test_a_mask_of_the_keys_is_followed():
    """The network's own attention mask, which self-attention is given too."""
    model = make("pixart")
    checkpoint = hybrids(model, **EXACT)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 4, 8, 8, generator=generator)
    context = torch.randn(1, 5, 16, generator=generator)
    mask = torch.ones(1, 16)
    mask[:, 10:] = 0
    with torch.no_grad():
        wanted = call(model, x, context, 500, attention_mask=mask)
        plain = call(model, x, context, 500)
        apply(model, checkpoint)
        own = call(model, x, context, 500, attention_mask=mask)
    assert not torch.allclose(wanted, plain, atol=1e-3)
    torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-4)


def test_half_precision_and_gradients_pass():
    model = make("sd")
    apply(model, hybrids(model, **HYBRID))
    x = torch.randn(1, 4, 16, 12, requires_grad=True)
    call(model, x, torch.randn(1, 5, 16), 500).square().sum().backward()
    assert x.grad.abs().sum() > 0
    whole = run(model)
    half = run(model.to(torch.bfloat16)).float()
    assert (half - whole).norm() / whole.norm() < 0.05


def test_other_heads_are_refused_and_nothing_is_changed():
    model = make("sd")
    checkpoint = hybrids(model, **HYBRID)
    site, mixer = next(iter(checkpoint.blocks.items()))
    spec = mixer.spec
    checkpoint.blocks[site] = HybridMixer(HybridSpec(spec.dim, 2 * spec.heads, spec.head_dim // 2))
    before = run(model)
    with pytest.raises(DeltaConvError, match=f"{2 * spec.heads} heads at {site}.* has {spec.heads} there"):
        apply(model, checkpoint)
    assert torch.equal(run(model), before)


def test_an_attention_that_does_more_is_refused():
    model = make("sd")
    site, attention = next(iter(find_sites(model).attentions.items()))
    attention.rescale_output_factor = 2.0
    with pytest.raises(DeltaConvError, match=f"{site} has rescale_output_factor"):
        apply(model, hybrids(model, **HYBRID))


def test_is_fitted_to_what_the_model_does_while_it_runs(tmp_path):
    """The fit's held-out error is that of the mixers on the queries, keys and values of the held-out call."""
    model = make("sd")
    found = find_sites(model)
    specs = {site: mixer.spec for site, mixer in hybrids(model, **HYBRID).blocks.items()}
    fit = HybridFit({site: [spec] for site, spec in specs.items()}, FitSettings(rows=10**6, held_out=2))
    hooks = [module._forward_pre_hooks.copy() for module in model.modules()]
    fitted = fit_hybrids(
        fit, lambda see: watched(found, specs, see), lambda number: run(model, timestep=300 * number), 2
    )
    assert hooks == [module._forward_pre_hooks for module in model.modules()]
    calls = []
    with watched(found, specs, lambda *call: calls.append(call)):
        run(model, timestep=300)
    for site, q, k, v, grid, mask in calls:
        full = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        mixer = fitted[site][0].mixer
        error = (mixer(q, k, v, grid, mask) - full).norm() / full.norm()
        assert fitted[site][0].error == pytest.approx(float(error), rel=1e-3)
    checkpoint = Checkpoint(found.architecture, {site: fitted[site][0].mixer for site in specs})
    apply(model, checkpoint)
    assert torch.isfinite(run(model)).all()


def test_the_documented_script(tmp_path, monkeypatch):
    """docs/hybrid.md as it stands, but for the size of its pictures."""
    text = (Path(__file__).parents[2] / "docs" / "hybrid.md").read_text(encoding="utf-8")
    script = text.partition("```python\n")[2].partition("```")[0]
    assert "num_inference_steps=8" in script
    size = 'num_inference_steps=2, width=64, height=48, use_resolution_binning=False, output_type="latent"'
    torch.manual_seed(0)
    pipeline = make_pixart_pipeline(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    monkeypatch.chdir(tmp_path)
    program = compile(script.replace("num_inference_steps=8", size), "docs/hybrid.md", "exec")
    names = {"pipeline": pipeline}
    FunctionType(program, names)()
    loaded = load_checkpoint(tmp_path / "hybrid.safetensors")
    assert loaded.blocks.keys() | loaded.kept.keys() == names["candidates"].keys() and loaded.blocks
