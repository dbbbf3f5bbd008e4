"""ΔConv Distill in this process: what it learns, what comes out, and that the teacher never notices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from testing.comfy_distill import distil, latents, single_items, weights
from testing.comfy_models import (
    conditioning,
    in_pack,
    make_pixart,
    make_unet,
    run_patch_node,
    same_state,
    sample,
    state,
    wrapped_by_compile,
)
from testing.compare import largest_error, same_weights

pytestmark = pytest.mark.usefixtures("output")


@pytest.fixture
def inference_unet():
    """A MODEL as ComfyUI's loaders make them: its weights are inference tensors."""
    with torch.inference_mode():
        model = make_unet()
    before = state(model)
    yield model
    model.detach()
    assert same_state(before, model)
    assert all(parameter.is_inference() for parameter in model.model.parameters())


# ---- the teacher ----


def test_a_teacher_made_in_inference_mode_learns_and_stays_as_it_was(pack, inference_unet):
    picture = sample(inference_unet)
    objects = {name: id(p) for name, p in inference_unet.model.named_parameters()}
    patched, checkpoint, losses, steps = distil(pack, inference_unet).args
    assert objects == {name: id(p) for name, p in inference_unet.model.named_parameters()}
    assert torch.equal(sample(inference_unet), picture)
    student = sample(patched)
    assert not torch.equal(student, picture) and largest_error(student, picture) < 0.1
    assert torch.equal(sample(inference_unet), picture)
    assert steps == 4 and len(losses["loss"]) == 4
    assert len(checkpoint.blocks) == 5
    assert not any(w.requires_grad or w.is_inference() for w in weights(checkpoint).values())


def test_a_teacher_whose_network_another_node_compiled(pack, unet):
    _, plain, *_ = distil(pack, unet).args
    _, wrapped, *_ = distil(pack, wrapped_by_compile(unet)).args
    expected = weights(plain)
    for name, weight in weights(wrapped).items():
        assert largest_error(weight, expected[name]) < 1e-3


@pytest.mark.parametrize("error", [None, RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", [1, 3])
def test_the_teacher_after_a_run_that_was_stopped(pack, inference_unet, stop_after, step, error):
    import comfy.model_management as management

    picture = sample(inference_unet)
    stop_after(step, error)
    kind = management.InterruptProcessingException if error is None else type(error)
    with pytest.raises(kind):
        distil(pack, inference_unet)
    assert torch.equal(sample(inference_unet), picture)
    attention = inference_unet.model.diffusion_model.middle_block[1].transformer_blocks[0].attn1
    assert "forward" not in vars(attention)


@pytest.mark.parametrize("build", [make_unet, make_pixart])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_of_few_bits(pack, build, dtype):
    """The result is near that of the same weights in float32."""
    with torch.inference_mode():
        few = build(dtype) if build is make_pixart else build(dtype, torch.float32)
        many = build(torch.float32)
        many.model.load_state_dict({key: w.float() for key, w in few.model.state_dict().items()})
    before = state(few)
    size = (48, 48) if build is make_pixart else (16, 16)
    data, positive = latents((2, 4, *size)), [conditioning(1)]
    first = distil(pack, few, data, positive).args
    second = distil(pack, many, data, positive).args
    assert first[2]["loss"] == pytest.approx(second[2]["loss"], rel=1e-3)
    few.detach()
    assert same_state(before, few)
    assert next(few.model.diffusion_model.parameters()).dtype == dtype


def test_a_lora_is_part_of_the_teacher(pack, unet):
    """Blocks learned with it on the MODEL are those learned from a model that it was merged into."""
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_v.weight"
    change = torch.randn(64, 64, generator=torch.Generator().manual_seed(5))
    with_lora = unet.clone()
    with_lora.add_patches({key: (change,)}, 0.5)
    merged = make_unet()
    merged.model.get_parameter(key).data += 0.5 * change
    learned = [weights(distil(pack, model).args[1]) for model in (with_lora, merged, unet)]
    assert same_weights(learned[0], learned[1]) and not same_weights(learned[0], learned[2])


def test_weights_that_are_loaded_layer_by_layer(pack, inference_unet, monkeypatch):
    """Where memory is short, ComfyUI casts weights, LoRAs included, at each call of their layer."""
    import comfy.model_management as management

    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_v.weight"
    model = inference_unet.clone()
    model.add_patches({key: (torch.randn(64, 64, generator=torch.Generator().manual_seed(5)),)}, 0.5)
    expected = weights(distil(pack, model).args[1])
    asked = []

    def load_little(models, memory_required):
        asked.append(memory_required)
        models[0].patch_model(models[0].load_device, lowvram_model_memory=1)
        assert models[0].model.model_lowvram and models[0].lowvram_patch_counter() == 1

    monkeypatch.setattr(management, "load_models_gpu", load_little)
    monkeypatch.setattr(management, "NUM_STREAMS", 2)
    learned = weights(distil(pack, model).args[1])
    for name, weight in expected.items():
        torch.testing.assert_close(learned[name], weight, rtol=1e-3, atol=1e-5)
    assert management.NUM_STREAMS == 2
    assert asked[0] > 20 * sum(weight.numel() for weight in expected.values())


def test_attention_without_gradients_is_not_used(pack, unet):
    """Another node may have put in an attention that a backward pass cannot go through."""

    def quantized(function, q, k, v, heads, **kwargs):
        raise AssertionError("used while training")

    model = unet.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = quantized
    assert same_weights(weights(distil(pack, model).args[1]), weights(distil(pack, unet).args[1]))


def test_deltaconv_on_the_model_is_not_the_teacher(pack, unet, checkpoint):
    patched = run_patch_node(pack, unet, checkpoint).args[0]
    learned = [distil(pack, model).args for model in (patched, unet)]
    assert same_weights(weights(learned[0][1]), weights(learned[1][1]))
    assert torch.equal(sample(learned[0][0]), sample(learned[1][0]))


def test_lora_training_on_the_result(pack, inference_unet):
    """ComfyUI's own Train LoRA takes the patched MODEL."""
    from comfy_extras.nodes_train import TrainLoraNode

    if not hasattr(TrainLoraNode, "execute"):
        pytest.skip("this version's Train LoRA takes no lists")
    inference_unet.cached_patcher_init = (lambda disable_dynamic: make_unet(), ())
    patched = distil(pack, inference_unet).args[0]
    inputs = TrainLoraNode.define_schema().inputs
    options = {input.id: [input.default] for input in inputs if hasattr(input, "default")}
    options |= {"steps": [1], "rank": [2], "training_dtype": ["fp32"], "lora_dtype": ["fp32"]}
    with torch.inference_mode():
        output = TrainLoraNode.execute([patched], *single_items()[:2], **options)
    (losses,) = (value["loss"] for value in output.args if isinstance(value, dict) and "loss" in value)
    assert len(losses) == 1


def test_a_model_in_dynamic_vram_that_cannot_be_loaded_plainly(pack, unet, monkeypatch):
    def clone(disable_dynamic=False, **more):
        raise RuntimeError("cached_patcher_init is not initialized")

    model = unet.clone()
    model.is_dynamic, model.clone = lambda: True, clone
    with (
        pytest.raises(ValueError, match=r"cached_patcher_init.*--disable-dynamic-vram"),
        in_pack(pack, "nodes.host.model.borrow").borrowed_model(model, torch.float32, 0),
    ):
        pass


# ---- the learning ----


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_blocks_start_exactly(pack, precision):
    """W_out W_v, though the output's bias is far larger, whatever the training computes in."""
    unet, site = make_unet(), "middle_block.1.transformer_blocks.0.attn1"
    attention = unet.model.diffusion_model.get_submodule(site)
    with torch.no_grad():
        attention.to_out[0].bias += 100
        product = (attention.to_out[0].weight @ attention.to_v.weight).detach()
    started = []
    module = in_pack(pack, "deltaconv_core.distill.session")
    start = module.warm_start

    def watched(block, attention):
        start(block, attention)
        started.append(block.conv_pool.weight.detach().clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "warm_start", watched)
        distil(pack, unet, preset="custom", precision=precision, layer_steps=1, output_steps=0, blocks="mid")
    assert largest_error(started[0], product) < 1e-4


@pytest.mark.parametrize("phase", ["layer_steps", "output_steps"])
@pytest.mark.parametrize("feature", ["output", "residual"])
@pytest.mark.parametrize("build", [make_unet, make_pixart])
def test_every_block_learns(pack, build, phase, feature):
    """By gradients alone; end to end, by those that come from the model's output."""
    module, runs = in_pack(pack, "nodes.host.distill.session"), in_pack(pack, "nodes.host.distill.runs")
    widgets = in_pack(pack, "nodes.host.distill.widgets").Widgets
    size = (48, 48) if build is make_pixart else (16, 16)
    model = build()
    data = in_pack(pack, "nodes.host.distill.dataset").read_dataset(
        model, latents((1, 4, *size)), [conditioning(1)], None
    )
    learned = []
    for steps in (1, 4):
        counts = {"layer_steps": 0, "output_steps": 0, phase: steps, "preview_every": 0}
        job = widgets(**counts, weight_decay=0.0, beta=0.0, ema=0.0, feature=feature, precision="fp32")
        checkpoint, _ = module.Distillation(model, data, job).run(runs.open_run("new run", "x"), None)
        learned.append(weights(checkpoint))
    one, four = learned
    assert [name for name in one if torch.equal(one[name], four[name])] == []


def test_checkpointing_changes_nothing(pack, unet):
    first, second = (distil(pack, unet, checkpointing=on).args[1] for on in (True, False))
    assert same_weights(weights(first), weights(second))


@pytest.fixture
def sharp_unet():
    """A U-Net whose tokens attend to few others: more to learn than the warm start knows."""
    model = make_unet()
    for name, weight in model.model.named_parameters():
        if "attn1.to_q" in name or "attn1.to_out.0.weight" in name:
            weight.data *= 20
    return model


def test_the_student_comes_nearer(pack, sharp_unet):
    data = latents((4, 4, 16, 16))
    job = {"batch_size": 4, "layer_steps": 60, "output_steps": 0, "learning_rate": 3e-3}
    losses = distil(pack, sharp_unet, data, [conditioning(1)], **job).args[2]["loss"]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions(pack, sharp_unet, precision):
    exact = distil(pack, sharp_unet).args[2]["loss"]
    near = distil(pack, sharp_unet, precision=precision).args[2]["loss"]
    assert near == pytest.approx(exact, rel=0.1) and near != exact


# ---- what the sampler would do ----


def test_the_noise_of_every_kind_of_prediction(pack):
    """The adapter's noise is what the network itself says, for a model that predicts noise and for one that
    predicts v; and a model whose clean latent is right gives the very noise."""
    import comfy.model_sampling as sampling

    borrow, adapter = in_pack(pack, "nodes.host.model.borrow"), in_pack(pack, "nodes.host.distill.network")
    sites = in_pack(pack, "nodes.host.model.sites")
    for kind in (sampling.EPS, sampling.V_PREDICTION, sampling.X0, sampling.CONST):
        model = make_unet()
        base = (
            sampling.ModelSamplingDiscreteFlow if kind is sampling.CONST else sampling.ModelSamplingDiscrete
        )
        model.add_object_patch("model_sampling", type("Sampling", (base, kind), {})())
        clean, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        with borrow.borrowed_model(model, torch.float32, 0) as clone:
            network = adapter.ComfyNetwork(clone, sites.find_sites(clone).sites)
            sigma = network.sigmas[[100, 500, 900]]
            batch = network.batch(clean, noise, sigma, {})
            expected = clone.model.model_sampling.noise_scaling(sigma.view(-1, 1, 1, 1), noise.clone(), clean)
            torch.testing.assert_close(batch.noisy, expected)
            ratio = (1 - sigma) / sigma if kind is sampling.CONST else 1 / sigma
            torch.testing.assert_close(batch.snr, ratio**2)
            network.base.apply_model = lambda *args, clean=clean, **_: clean
            torch.testing.assert_close(network(batch), noise, rtol=1e-4, atol=1e-4)
        model.detach()


def test_the_teacher_is_what_the_sampler_runs(pack, unet):
    """The adapter's clean latents are those that a sampler's callback sees, with patches of other nodes."""
    import comfy.sample

    borrow, adapter = in_pack(pack, "nodes.host.model.borrow"), in_pack(pack, "nodes.host.distill.network")
    dataset = in_pack(pack, "nodes.host.distill.dataset")
    model = unet.clone()
    model.set_model_output_block_patch(lambda h, skip, options: (h * 1.1, skip))
    seen = {}
    latent = torch.zeros(1, 4, 16, 16)
    noise = comfy.sample.prepare_noise(latent, seed=3)
    comfy.sample.sample(
        model, noise, 1, 1.0, "euler", "normal", conditioning(1), conditioning(2), latent,
        callback=lambda step, x0, x, total: seen.update(x0=x0, x=x), disable_pbar=True, seed=3,
    )  # fmt: skip
    data = dataset.read_dataset(model, [{"samples": latent}], [conditioning(1)], None)
    with borrow.borrowed_model(model, torch.float32, 0) as clone:
        network = adapter.ComfyNetwork(clone, {})
        conditions = network.join([network.encode(data.samples[0].condition, latent)])
        clean = network.clean(seen["x"], network.sigmas[-1:], conditions)
    torch.testing.assert_close(clean, seen["x0"], rtol=1e-4, atol=1e-4)


def test_attention_replaced_by_another_node_cannot_be_learned(pack, unet):
    model = unet.clone()
    model.set_model_attn1_replace(lambda q, k, v, options: q, "middle", 0, 0)
    with pytest.raises(ValueError, match="replaces the self-attention of 1 blocks.*take that node off"):
        distil(pack, model)


# ---- what comes out ----


def test_the_loss_map_can_be_plotted(pack, unet):
    import folder_paths
    from comfy_extras.nodes_train import LossGraphNode

    Path(folder_paths.get_temp_directory()).mkdir(exist_ok=True)
    losses = distil(pack, unet, layer_steps=1, output_steps=0).args[2]
    assert len(losses["loss"]) == 2 and losses["loss"][1] == pytest.approx(losses["loss"][0], rel=1e-12)
    if hasattr(LossGraphNode, "execute"):
        drawn = LossGraphNode.execute(losses, "graph").ui.as_dict()
    else:
        drawn = LossGraphNode().plot_loss(losses, "graph")["ui"]
    assert len(drawn["images"]) == 1


def test_each_phase_of_the_loss_map_starts_at_one(pack):
    row = in_pack(pack, "deltaconv_core.distill").Row
    rows = [
        row(1, "layer-wise", 1e-3, {"feature": 8.0}, 1.0),
        row(2, "layer-wise", 1e-3, {"feature": 2.0}, 1.0),
    ]
    for step, value in ((3, 0.5), (4, 0.125)):
        losses = {"feature": 2.0, "teacher": value, "noise": 1.0}
        rows.append(row(step, "end to end", 1e-3, losses, 1.0))
    loss_map = in_pack(pack, "nodes.host.distill.session").loss_map
    assert loss_map(rows) == {"loss": [1.0, 0.25, 1.0, 0.25]}
    skipped = row(1, "layer-wise", 1e-3, {"feature": float("inf")}, float("nan"))
    assert loss_map([skipped, *rows]) == loss_map(rows)
    assert loss_map([]) == {"loss": [1.0, pytest.approx(1.0)]} and len(set(loss_map([])["loss"])) == 2


def test_equal_runs_give_equal_files(pack, unet, tmp_path):
    core = in_pack(pack, "deltaconv_core")
    for name in ("a", "b"):
        core.save_checkpoint(distil(pack, unet).args[1], tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    metadata = core.load_checkpoint(tmp_path / "a").metadata
    assert metadata["steps"] == "4" and json.loads(metadata["training"])["layer_steps"] == 2
    assert metadata["data"].startswith("2 latents (2 of 16x16)")


def colored_unet():
    """One whose latents ComfyUI knows the colors of."""
    model = make_unet(channels=3)
    model.model.latent_format.latent_rgb_factors = torch.eye(3).tolist()
    return model


def test_previews(pack, monkeypatch):
    """Student beside teacher; before any learning of weights they differ, without blocks they would not."""
    import comfy.utils

    pictures = []
    monkeypatch.setattr(
        comfy.utils.ProgressBar,
        "update_absolute",
        lambda self, value, total=None, preview=None: pictures.append((value, preview)),
    )
    model, data = colored_unet(), latents((1, 3, 16, 24))
    distil(pack, model, data, [conditioning(1)], preview_every=2, negative=[conditioning(0)])
    assert [value for value, preview in pictures if preview] == [2, 4]
    _, picture, _ = pictures[1][1]
    assert picture.size == (2 * 24 * 16, 24 + 16 * 16)  # a line of text above
    left, right = (picture.crop((x, 24, x + 384, 280)).tobytes() for x in (0, 384))
    assert left != right
    assert len(set(left)) > 20


def test_a_preview_without_memory_for_it_does_not_end_the_run(pack, monkeypatch, caplog):
    import comfy.model_management as management

    def full(self):
        raise management.OOM_EXCEPTION("out of memory")

    monkeypatch.setattr(in_pack(pack, "nodes.host.distill.preview").Preview, "__call__", full)
    data = latents((1, 3, 16, 24))
    assert distil(pack, colored_unet(), data, [conditioning(1)], preview_every=1).args[3] == 4
    assert caplog.text.count("too little memory for previews") == 1


def test_presets(pack):
    presets = in_pack(pack, "nodes.host.distill.presets")
    cpu = torch.device("cpu")
    for preset in presets.PRESETS.values():
        decided = presets.settled(preset, cpu)
        assert decided.precision == "fp32" and decided.optimizer == "adamw"
        assert decided.batch_size * decided.accumulation == 4
    specs = in_pack(pack, "deltaconv_core.sites").authors_specs("sdxl")
    settings = in_pack(pack, "deltaconv_core.distill").Settings
    weights = sum(spec.num_parameters for spec in specs.values())
    assert presets.training_bytes(specs, settings()) == 20 * weights
    assert presets.training_bytes(specs, settings(optimizer="adamw8bit", ema=0.0)) == 10 * weights
