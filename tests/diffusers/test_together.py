"""ΔConv together with what else people do to pipelines: LoRA, processors, slicing, ControlNet, IP-Adapter."""

from __future__ import annotations

import logging

import diffusers
import pytest
import torch

from deltaconv_core import DeltaConvError
from deltaconv_core.diffusers import apply, remove
from testing.compare import largest_error
from testing.diffusers_models import (
    by_hand,
    make,
    make_checkpoint,
    make_pipeline,
    run,
    sample,
)

MID = "mid_block.attentions.0.transformer_blocks.0"
SIZE = (12, 16)  # of the latents that `sample` makes


@pytest.fixture
def pipe(tmp_path):
    return make_pipeline(tmp_path)


@pytest.fixture
def checkpoint(pipe):
    return make_checkpoint(pipe.unet)


def sampled_by_hand(tmp_path, checkpoint, prepare=lambda pipe: None, **options):
    """Of a pipeline that was prepared first, and then got the blocks for good and without our code."""
    pipe = make_pipeline(tmp_path)
    prepare(pipe)
    by_hand(pipe.unet, checkpoint, SIZE)
    return sample(pipe, **options)


@pytest.fixture
def lora(tmp_path):
    """Makes a LoRA file that changes the layers with these names."""
    peft = pytest.importorskip("peft")

    def write(*layers):
        unet = make("sd")
        unet.add_adapter(peft.LoraConfig(r=2, target_modules=list(layers)))
        torch.manual_seed(5)
        for name, parameter in unet.named_parameters():
            if "lora" in name:
                parameter.data = torch.randn(parameter.shape) * 0.2
        folder = tmp_path / "-".join(layers)
        diffusers.StableDiffusionPipeline.save_lora_weights(
            folder, unet_lora_layers=peft.get_peft_model_state_dict(unet)
        )
        return folder

    return write


def warnings_of(caplog):
    return [
        r.message
        for r in caplog.records
        if r.name.startswith("deltaconv_core") and r.levelno >= logging.WARNING
    ]


@pytest.mark.parametrize("order", ["LoRA first", "ΔConv first"])
def test_lora_acts_except_on_the_attention_that_is_replaced(pipe, checkpoint, lora, tmp_path, order, caplog):
    both = lora("to_q", "to_out.0", "ff.net.2", "conv1")

    def load(pipe):
        pipe.load_lora_weights(both, adapter_name="style")

    if order == "LoRA first":
        load(pipe)
        apply(pipe, checkpoint)
    else:
        apply(pipe, checkpoint)
        load(pipe)
    output = sample(pipe)
    assert largest_error(output, sampled_by_hand(tmp_path, checkpoint, load)) < 1e-5
    assert largest_error(output, sampled_by_hand(tmp_path, checkpoint)) > 1e-3
    (warning,) = warnings_of(caplog)
    assert "a LoRA (style) changes 14 layers of the self-attention at 7 sites" in warning
    assert (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q, " in warning and "and 11 more" in warning
    )
    pipe.unload_lora_weights()
    assert largest_error(sample(pipe), sampled_by_hand(tmp_path, checkpoint)) < 1e-5
    remove(pipe)
    assert largest_error(sample(pipe), sample(make_pipeline(tmp_path))) < 1e-6


@pytest.mark.parametrize(("layer", "said"), [("attn1.to_v", True), ("attn2.to_v", False), ("proj_in", False)])
def test_a_lora_is_warned_of_only_where_it_has_no_effect(pipe, checkpoint, lora, layer, said, caplog):
    apply(pipe, checkpoint)
    plain = sample(pipe)
    pipe.load_lora_weights(lora(layer))
    assert torch.equal(sample(pipe), plain) == said
    other_processors(pipe)
    sample(pipe)
    assert len(warnings_of(caplog)) == said


def test_lora_acts_on_attention_that_is_left(pipe, checkpoint, lora, caplog):
    apply(pipe, checkpoint, blocks="-mid")
    plain = sample(pipe)
    pipe.load_lora_weights(lora(f"{MID}.attn1.to_v"))
    assert not torch.equal(sample(pipe), plain) and warnings_of(caplog) == []


def test_base_weights_under_a_lora(pipe, checkpoint, lora, tmp_path):
    """A LoRA on the very convolution that base weights go into: one acts on top of the other."""
    name = "down_blocks.1.resnets.0.conv1.weight"
    checkpoint.base_weights = {name: pipe.unet.get_parameter(name) * 1.5}

    def load(pipe):
        pipe.unet.get_parameter(name).mul_(1.5)
        pipe.load_lora_weights(lora("conv1"))

    expected = sampled_by_hand(tmp_path, checkpoint, load)
    pipe.load_lora_weights(lora("conv1"))
    apply(pipe, checkpoint)
    assert largest_error(sample(pipe), expected) < 1e-5
    pipe.fuse_lora()
    with pytest.raises(DeltaConvError, match=rf"a LoRA is fused into {name}.*unfuse_lora\(\) first"):
        remove(pipe)
    with pytest.raises(DeltaConvError, match="a LoRA is fused"):
        apply(pipe, checkpoint)
    pipe.unfuse_lora()
    remove(pipe)
    pipe.unload_lora_weights()
    assert largest_error(sample(pipe), sample(make_pipeline(tmp_path))) < 1e-6


def slicing(pipe):
    pipe.enable_attention_slicing(1)


def other_processors(pipe):
    pipe.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())


def fused_projections(pipe):
    pipe.unet.fuse_qkv_projections()


def free_u(pipe):
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


@pytest.mark.parametrize("change", [slicing, other_processors, fused_projections, free_u])
@pytest.mark.parametrize("order", ["before", "after"])
def test_other_ways_to_compute_attention(pipe, checkpoint, tmp_path, change, order, caplog):
    if order == "before":
        change(pipe)
    apply(pipe, checkpoint)
    change(pipe)
    assert largest_error(sample(pipe), sampled_by_hand(tmp_path, checkpoint, change)) < 1e-5
    assert warnings_of(caplog) == []
    remove(pipe)
    plain = make_pipeline(tmp_path)
    change(plain)
    assert torch.equal(sample(pipe), sample(plain))


class PAGIdentitySelfAttnProcessor2_0:
    def __call__(self, attn, hidden_states, *args, **kwargs):
        return hidden_states


@pytest.mark.parametrize("order", ["before", "after"])
def test_processors_that_cannot_act_are_named(pipe, checkpoint, order, caplog):
    attention = pipe.unet.get_submodule(f"{MID}.attn1")
    if order == "before":
        attention.set_processor(PAGIdentitySelfAttnProcessor2_0())
    apply(pipe, checkpoint)
    attention.set_processor(PAGIdentitySelfAttnProcessor2_0())
    sample(pipe)
    (warning,) = warnings_of(caplog)
    assert "PAGIdentitySelfAttnProcessor2_0 computes the self-attention where ΔConv stands" in warning


def test_vae_tiling_and_several_pictures(pipe, checkpoint, tmp_path):
    def prepare(pipe):
        pipe.vae.enable_tiling()
        pipe.vae.enable_slicing()

    options = {
        "output_type": "pt",
        "num_images_per_prompt": 2,
        "prompt": ["a cat", "a dog"],
        "negative_prompt": None,
    }
    prepare(pipe)
    apply(pipe, checkpoint)
    pictures = sample(pipe, **options)
    assert pictures.shape == (4, 3, 24, 32)
    assert largest_error(pictures, sampled_by_hand(tmp_path, checkpoint, prepare, **options)) < 1e-4


def test_controlnet(checkpoint, tmp_path):
    def pipeline(unet):
        control = diffusers.ControlNetModel.from_unet(make("sd"), conditioning_embedding_out_channels=(8, 8))
        torch.manual_seed(6)
        for parameter in control.parameters():
            parameter.data = torch.randn(parameter.shape) * 0.1
        return make_pipeline(tmp_path, unet=unet, controlnet=control.eval())

    options = {"image": torch.linspace(0, 1, 3 * 24 * 32).view(1, 3, 24, 32)}
    pipe = pipeline(make("sd"))
    apply(pipe, checkpoint)
    output = sample(pipe, **options)
    assert largest_error(output, sample(pipeline(by_hand(make("sd"), checkpoint, SIZE)), **options)) < 1e-5
    assert largest_error(output, sample(pipe, **options, controlnet_conditioning_scale=0.0)) > 1e-3


def ip_adapter(pipe):
    """An IP-Adapter of four picture tokens for embeddings of 8 numbers."""
    torch.manual_seed(7)
    attentions = [name for name in pipe.unet.attn_processors if "attn2" in name]
    layers = {}
    for number, name in enumerate(attentions):
        out = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        layers |= {f"{2 * number + 1}.to_{kind}_ip.weight": torch.randn(out, 16) * 0.3 for kind in "kv"}
    projection = {"proj.weight": torch.randn(64, 8), "proj.bias": torch.zeros(64)}
    projection |= {"norm.weight": torch.ones(16), "norm.bias": torch.zeros(16)}
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}])


@pytest.mark.parametrize("order", ["before", "after"])
def test_ip_adapter(pipe, checkpoint, tmp_path, order, caplog):
    options = {"ip_adapter_image_embeds": [torch.linspace(-1, 1, 16).view(2, 1, 8)]}
    if order == "before":
        ip_adapter(pipe)
    apply(pipe, checkpoint)
    if order == "after":
        ip_adapter(pipe)
    output = sample(pipe, **options)
    assert largest_error(output, sampled_by_hand(tmp_path, checkpoint, ip_adapter, **options)) < 1e-5
    assert largest_error(output, sampled_by_hand(tmp_path, checkpoint)) > 1e-3
    assert warnings_of(caplog) == []


def test_a_model_with_motion_modules(sd):
    """AnimateDiff's U-Net: the spatial attention is replaced, the temporal one stays."""
    torch.manual_seed(8)
    motion = diffusers.MotionAdapter(
        block_out_channels=(16, 32, 32), motion_layers_per_block=1, motion_num_attention_heads=2,
        motion_norm_num_groups=4, use_motion_mid_block=False,
    )  # fmt: skip
    models = [diffusers.UNetMotionModel.from_unet2d(make("sd"), motion).eval() for _ in range(2)]
    x, context = torch.randn(1, 4, 3, 8, 12), torch.randn(1, 5, 16)
    apply(models[0], sd.checkpoint)
    by_hand(models[1], sd.checkpoint, (8, 12))
    with torch.no_grad():
        outputs = [model(x, 5, context.repeat(3, 1, 1)).sample for model in models]
    assert largest_error(*outputs) < 1e-5


def test_layerwise_casting(sd):
    """Weights of the model stored in 8 bits: the blocks are kept in what the model computes in."""
    if not hasattr(sd.model, "enable_layerwise_casting"):
        pytest.skip("this diffusers has no layerwise casting")
    sd.model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    plain = run(sd.model)
    apply(sd.model, sd.checkpoint)
    stored = {p.dtype for block in sd.model.deltaconv.blocks.values() for p in block.parameters()}
    assert stored == {torch.float32} and run(sd.model).isfinite().all()
    remove(sd.model)
    assert torch.equal(run(sd.model), plain)
