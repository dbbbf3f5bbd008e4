"""Joint mixers on diffusers' own classes of text and image."""

from __future__ import annotations

import pytest
import torch

from deltaconv_core import Checkpoint, DeltaConvError, load_checkpoint, save_checkpoint
from deltaconv_core.cli import main
from deltaconv_core.diffusers import apply, remove
from deltaconv_core.diffusers.applied import applied
from deltaconv_core.diffusers.conversion import Pictures, convert
from deltaconv_core.diffusers.joint import find_joint
from deltaconv_core.distill import conversion
from deltaconv_core.distill.conversion import Wishes
from deltaconv_core.mixers.joint import JointMixer, JointSpec
from deltaconv_core.mixers.joint import plan as plans
from testing.diffusers_models import make_flux_pipeline, sample

FAMILIES = ["flux", "flux_reference", "flux2", "flux2_reference", "chroma", "sd3", "qwen", "qwen_masked"]
FAMILIES += ["qwen_reference", "lumina", "z_image", "z_image_masked"]
CLASSES = {
    "flux": "FluxTransformer2DModel",
    "flux2": "Flux2Transformer2DModel",
    "chroma": "ChromaTransformer2DModel",
    "sd3": "SD3Transformer2DModel",
    "qwen": "QwenImageTransformer2DModel",
    "lumina": "Lumina2Transformer2DModel",
    "z_image": "ZImageTransformer2DModel",
}
EXACT = {"landmarks": 2**14, "kernel_size": 0}
WINDOW = {"landmarks": 2, "window": 63, "kernel_size": 3}  # over the whole image: exact, whatever the kernels
MIXED = {"landmarks": 6, "kernel_size": 3}
GRID, TEXT = (5, 7), 4


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Mixers run wherever they can."""
    monkeypatch.setattr(plans.Plan, "_found", lambda *_: plans.Verdict(True, None, "a test says so"))


@pytest.fixture
def ran(monkeypatch):
    """The layout of each call of a mixer."""
    calls, own = [], JointMixer.forward

    def forward(self, q, k, v, layout, *more):
        calls.append(layout)
        return own(self, q, k, v, layout, *more)

    monkeypatch.setattr(JointMixer, "forward", forward)
    return calls


def make(name):
    import diffusers

    needed = CLASSES[name.removesuffix("_reference").removesuffix("_masked")]
    if not hasattr(diffusers, needed):
        pytest.skip(f"this diffusers has no {needed}")
    torch.manual_seed(0)
    flux = {"num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
    flux |= {"joint_attention_dim": 12, "axes_dims_rope": (4, 6, 6), "in_channels": 8}
    lumina = {"in_channels": 4, "norm_eps": 1e-5, "cap_feat_dim": 12}
    if name.startswith("flux2"):
        flux |= {"axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16}
        model = diffusers.Flux2Transformer2DModel(**flux)
    elif name.startswith("flux"):
        model = diffusers.FluxTransformer2DModel(**flux, pooled_projection_dim=8)
    elif name == "chroma":
        more = {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
        model = diffusers.ChromaTransformer2DModel(**flux, **more)
    elif name == "sd3":
        model = diffusers.SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=32, pooled_projection_dim=8,
            pos_embed_max_size=16, dual_attention_layers=(0,),
        )  # fmt: skip
    elif name == "lumina":
        model = diffusers.Lumina2Transformer2DModel(
            **lumina, hidden_size=32, num_layers=2, num_refiner_layers=1, num_attention_heads=2,
            num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 6, 6), axes_lens=(64, 64, 64),
        )  # fmt: skip
    elif name.startswith("z_image"):
        model = diffusers.ZImageTransformer2DModel(
            **lumina, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, axes_dims=[4, 6, 6],
            axes_lens=[128, 64, 64],
        )  # fmt: skip
        for token in (model.x_pad_token, model.cap_pad_token):
            token.data.normal_()
    else:
        model = diffusers.QwenImageTransformer2DModel(
            in_channels=8, out_channels=2, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=12, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
    return model.eval().requires_grad_(False)


def ids(height, width, first=0):
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.full_like(rows, first), rows, columns], dim=-1).reshape(-1, 3).float()


def draw(model, name):
    """One call of two samples."""
    generator, (height, width) = torch.Generator().manual_seed(1), GRID
    tokens = height * width + (6 if name.endswith("reference") else 0)
    given = {
        "hidden_states": torch.randn(2, tokens, 8, generator=generator),
        "encoder_hidden_states": torch.randn(2, TEXT, 12, generator=generator),
        "timestep": torch.tensor([0.7, 0.7]),
    }
    if name.startswith("flux") or name == "chroma":
        extra = [ids(2, 3, 1)] if name.endswith("reference") else []
        given |= {"img_ids": torch.cat([ids(height, width), *extra]), "txt_ids": torch.zeros(TEXT, 3)}
    if name.startswith("flux2"):
        for part in ("img_ids", "txt_ids"):
            given[part] = torch.cat([given[part], torch.zeros(len(given[part]), 1)], dim=1)
        given["guidance"] = torch.tensor([4.0, 4.0])
    elif name == "lumina":
        given["hidden_states"] = torch.randn(2, 4, 2 * height, 2 * width, generator=generator)
        given["encoder_attention_mask"] = torch.ones(2, TEXT, dtype=torch.bool)
    elif name.startswith("z_image"):
        picture = torch.randn(2, 4, 1, 2 * height, 2 * width, generator=generator)
        texts = [given["encoder_hidden_states"][0], given["encoder_hidden_states"][1]]
        texts[1] = texts[1].repeat(9, 1) if name.endswith("masked") else texts[1]
        with torch.no_grad():
            return torch.stack(model(list(picture), given["timestep"], texts).sample)
    elif name.startswith("flux"):
        given["pooled_projections"] = torch.randn(2, 8, generator=generator)
    elif name == "sd3":
        given["hidden_states"] = torch.randn(2, 4, 2 * height, 2 * width, generator=generator)
        given["pooled_projections"] = torch.randn(2, 8, generator=generator)
    elif name.startswith("qwen"):
        shapes = [(1, height, width), (1, 2, 3)] if name.endswith("reference") else [(1, height, width)]
        given["img_shapes"] = [shapes] * 2
        if name == "qwen_masked":
            given["encoder_hidden_states_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    with torch.no_grad():
        return model(**given).sample


def mixers(model, **spec):
    torch.manual_seed(3)
    found = find_joint(model)
    blocks = {}
    for site, channels in found.channels.items():
        heads = found.attentions[site].heads
        blocks[site] = JointMixer(JointSpec(channels, heads, channels // heads, **spec)).requires_grad_(False)
        if blocks[site].spec.kernel_size:
            for parameter in blocks[site].parameters():
                parameter.normal_(std=0.3)
    return Checkpoint(found.architecture, blocks)


@pytest.mark.parametrize("exact", [EXACT, WINDOW], ids=["landmarks", "window"])
def test_where_mixers_are_attention_nothing_changes_and_they_come_off_again(name, exact, ran):
    model = make(name)
    before = draw(model, name)
    own_report = apply(model, mixers(model, **exact))
    sites = find_joint(model).attentions
    torch.testing.assert_close(draw(model, name), before, rtol=1e-5, atol=1e-5)
    assert len(ran) == len(sites) and {layout.grid for layout in ran} == {GRID}
    assert f"A joint mixer stands in for {len(sites)} of {len(sites)}" in own_report.text
    assert applied(model).mixer == "joint" and list(applied(model).specs) == list(sites)
    remove(model)
    assert applied(model) is None and torch.equal(draw(model, name), before)
    assert all("forward" not in one.__dict__ for one in sites.values())
    assert not model._forward_pre_hooks


def test_mixers_change_what_is_drawn_and_are_replaced_as_a_whole(name, tmp_path):
    model = make(name)
    before = draw(model, name)
    apply(model, mixers(model, **MIXED))
    assert not torch.allclose(draw(model, name), before, atol=1e-5)
    save_checkpoint(mixers(model, **EXACT), tmp_path / "joint.safetensors")
    assert "replaced as a whole" in apply(model, tmp_path / "joint.safetensors").text
    torch.testing.assert_close(draw(model, name), before, rtol=1e-5, atol=1e-5)


def test_another_attention_backend_is_named_once(caplog):
    model = make("flux")
    before = draw(model, "flux")
    apply(model, mixers(model, **MIXED))
    attention, *others = find_joint(model).attentions.values()
    attention.processor = lambda attn, x, encoder_hidden_states=None, *_, **__: (x, encoder_hidden_states)
    for other in others:
        other.processor = lambda attn, x, *_, **__: x
    with caplog.at_level("WARNING"):
        draw(model, "flux")
        draw(model, "flux")
    assert caplog.text.count("the attention backend at ") == 1
    assert "at transformer_blocks.0.attn is not PyTorch's own" in caplog.text
    assert before.isfinite().all()


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (lambda c: setattr(c, "architecture", "chroma"), {}, "the weights are for chroma"),
        (lambda c: None, {"end_percent": 0.5}, "run in all of the sampling"),
        (lambda c: None, {"blocks": "mid"}, "matches no site"),
        (lambda c: c.blocks.popitem(), {}, "none for single_transformer_blocks.1.attn"),
        (lambda c: c.blocks.clear(), {}, "hold no block.* use the model without"),
    ],
)
def test_what_does_not_go_together_is_refused(change, options, said):
    model = make("flux")
    checkpoint = mixers(model, **MIXED)
    change(checkpoint)
    with pytest.raises(DeltaConvError, match=said):
        apply(model, checkpoint, **options)
    assert applied(model) is None and not model._forward_pre_hooks


@pytest.fixture
def timed(monkeypatch):
    """Every mixer is faster than attention, those with more landmarks less so."""
    monkeypatch.setattr(
        conversion, "alternate", lambda runs, *_: {name: [0.01 * (int(name) or 20)] for name in runs}
    )


def latents(pipeline):
    """Of a picture, the same noise every time."""
    return sample(pipeline, max_sequence_length=8, width=64, height=48)


@pytest.mark.usefixtures("timed")
def test_what_is_fitted_stands_on_the_pipeline_which_was_left_alone(tmp_path):
    pipeline = make_flux_pipeline(tmp_path)
    before = latents(pipeline)
    wishes = Wishes(limit=1.0, pictures=8)
    found, result = convert(pipeline, Pictures(("a cat",), width=64, height=48, steps=2), wishes)
    assert torch.equal(latents(pipeline), before)
    assert not any(module._forward_pre_hooks for module in pipeline.transformer.modules())
    assert not any("forward" in one.__dict__ for one in found.attentions.values())
    checkpoint = result.checkpoint(found.architecture, found.channels, {})
    assert checkpoint.mixer == "joint" and set(checkpoint.blocks) == set(found.channels)
    assert checkpoint.metadata["sizes"] == "12 x 16, 6 x 8"
    apply(pipeline, checkpoint)
    assert not torch.equal(latents(pipeline), before)
    remove(pipeline)
    assert torch.equal(latents(pipeline), before)


@pytest.mark.usefixtures("timed")
def test_converting_follows_from_the_seed(tmp_path):
    pipeline = make_flux_pipeline(tmp_path)
    pictures = Pictures(("a cat", "a dog"), width=64, height=48, steps=1)
    some, again, other = (
        convert(pipeline, pictures, Wishes(limit=1.0, pictures=4, seed=seed))[1].mixers for seed in (3, 3, 4)
    )
    for site, mixer in some.items():
        weights = mixer.state_dict()
        assert all(torch.equal(weights[name], w) for name, w in again[site].state_dict().items())
    assert any(
        not torch.equal(w, other[site].state_dict()[name])
        for site, mixer in some.items()
        for name, w in mixer.state_dict().items()
    )


@pytest.mark.usefixtures("timed")
def test_a_pipeline_whose_first_argument_is_a_picture_is_given_the_prompt():
    """As FLUX.2's and Kontext's are."""
    import diffusers

    if not hasattr(diffusers, "Flux2Pipeline"):
        pytest.skip("this diffusers has no Flux2Pipeline")
    drawn = []

    class Flux2Pipeline(diffusers.Flux2Pipeline):
        def encode_prompt(self, prompt, **_):
            drawn.append(prompt)
            return torch.randn(1, TEXT, 12, generator=torch.Generator().manual_seed(2)), torch.zeros(
                1, TEXT, 4
            )

    model = make("flux2")
    model = type(model).from_config({**model.config, "in_channels": 16}).eval().requires_grad_(False)
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    pipeline = Flux2Pipeline(diffusers.FlowMatchEulerDiscreteScheduler(), vae, None, None, model)
    pipeline.set_progress_bar_config(disable=True)
    pictures = Pictures(("a cat", "a dog"), width=64, height=48, steps=1)
    found, result = convert(pipeline, pictures, Wishes(limit=1.0, pictures=4))
    assert drawn == ["a cat", "a dog"] * 2 and set(result.mixers) == set(found.channels)


def test_the_size_to_be_fast_at_has_to_be_named(tmp_path):
    with pytest.raises(DeltaConvError, match="got None x None; name the size"):
        convert(make_flux_pipeline(tmp_path), Pictures(("a cat",)), Wishes())


@pytest.mark.usefixtures("timed")
def test_the_command_converts(tmp_path, capsys):
    pipeline, file = make_flux_pipeline(tmp_path), tmp_path / "joint.safetensors"
    pipeline.save_pretrained(tmp_path / "model")
    arguments = [
        "convert-model",
        "--model",
        str(tmp_path / "model"),
        "--output",
        str(file),
        "--size",
        "64x48",
    ]
    arguments += ["--pictures", "4", "--steps", "1", "--max-error", "1", "--device", "cpu"]
    assert main(arguments) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert (
        "3 of 3 self-attentions are replaced by joint mixers" in printed and f"Written to {file}" in printed
    )
    loaded = load_checkpoint(file)
    assert loaded.mixer == "joint" and loaded.architecture == "flux"
    assert (
        loaded.metadata["pictures"] == "4 of 64x48, 1 steps" and loaded.metadata["sizes"] == "12 x 16, 6 x 8"
    )
    before = latents(pipeline)
    apply(pipeline, file)
    assert not torch.equal(latents(pipeline), before)


@torch.no_grad()
def test_texts_of_several_lengths_are_named(caplog):
    model = make("lumina")
    apply(model, mixers(model, **MIXED))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    call = {"hidden_states": torch.randn(2, 4, 10, 14), "timestep": torch.tensor([0.7, 0.7])}
    call |= {"encoder_hidden_states": torch.randn(2, TEXT, 12), "encoder_attention_mask": mask}
    with caplog.at_level("WARNING"):
        masked = model(**call).sample
    assert "since texts of 2, 4 tokens are in one batch" in caplog.text
    remove(model)
    assert torch.equal(model(**call).sample, masked)


@pytest.mark.parametrize("layer", ["to_q", "to_k", "to_v", "to_out.0"])
def test_what_is_put_on_the_projections_acts(layer, monkeypatch):
    """As LoRA does: a layer that calls the original and adds something."""
    model = make("flux")
    apply(model, mixers(model, **MIXED))
    before = draw(model, "flux")
    attention = find_joint(model).attentions["transformer_blocks.0.attn"]
    parent, _, last = layer.rpartition(".")
    own = attention.get_submodule(layer)

    class Added(torch.nn.Module):
        def forward(self, x):
            return own(x) + 3 * x

    monkeypatch.setitem(attention.get_submodule(parent)._modules, last, Added())
    assert (draw(model, "flux") - before).abs().max() > 1e-4
    monkeypatch.undo()
    assert torch.equal(draw(model, "flux"), before)
