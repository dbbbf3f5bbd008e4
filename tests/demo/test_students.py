"""Files of linear attention, and students at the sites of the demo model in ComfyUI."""

from importlib import import_module

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaconv_core import CheckpointError
from deltaconv_core.mixers.linear_attention import LinearAttention
from demo.files import student_file, teacher_file
from demo.study.students import (
    count_weights,
    is_linear,
    linear_mixers,
    load_linear,
    put_linear,
    put_student,
    save_linear,
)


def two_mixers():
    torch.manual_seed(0)
    return {"a.attn1": LinearAttention(8, 2, bias=True), "b": LinearAttention(6, 3, inner=12)}


def test_linear_attention_survives_its_file(tmp_path):
    file, made = tmp_path / "linear.safetensors", two_mixers()
    save_linear({site: mixer.half() for site, mixer in made.items()}, file, {"title": "test"})
    read = load_linear(file)
    assert is_linear(file) and not is_linear(student_file())
    assert read.keys() == made.keys() and read["b"].heads == 3
    for site, mixer in made.items():
        for name, tensor in mixer.state_dict().items():
            assert torch.equal(read[site].state_dict()[name], tensor.float())
    assert count_weights(file) == sum(p.numel() for mixer in made.values() for p in mixer.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, header: tensors.pop("b.to_out.bias"), "do not fit together"),
        (lambda tensors, header: tensors.update(c=torch.zeros(1)), "of no site: c"),
        (lambda tensors, header: tensors.update({"b.to_v.weight": torch.zeros(3, 3)}), "do not fit together"),
        (lambda tensors, header: header.update(heads='{"b": 5}'), "do not fit together"),
        (lambda tensors, header: header.update(mixer="other"), "expected a file of linear attention"),
    ],
)
def test_damaged_files_are_refused(tmp_path, change, message):
    file = tmp_path / "linear.safetensors"
    mixers = two_mixers()
    save_linear(mixers, file)
    tensors, header = load_file(file), {"mixer": "linear", "heads": '{"a.attn1": 2, "b": 3}'}
    change(tensors, header)
    save_file(tensors, file, header)
    with pytest.raises(CheckpointError, match=message):
        load_linear(file)


@pytest.mark.parametrize("text", [None, "step,stage"])
def test_other_files_are_no_students(tmp_path, text):
    file = tmp_path / "log.csv"
    if text:
        file.write_text(text)
    for read in (is_linear, count_weights):
        with pytest.raises(CheckpointError, match=r"log\.csv is not a safetensors file"):
            read(file)


@pytest.fixture(scope="module")
def demo(pack):
    """(MODEL, its sites, the pack's name)."""
    model = import_module(".nodes.host.demo.unet", pack.__name__).load_demo_model(str(teacher_file()))
    sites = import_module(".nodes.host.model.sites", pack.__name__).find_sites(model).sites
    return model, sites, pack.__name__


@torch.no_grad()
def run(model, size=(10, 14)):
    """The network's output with the MODEL's patches, on a fixed input."""
    generator = torch.manual_seed(0)
    noisy, context = torch.randn(1, 3, *size, generator=generator), torch.randn(1, 6, 64, generator=generator)
    model.patch_model()
    try:
        return model.model.diffusion_model(noisy, torch.tensor([500.0]), context, transformer_options={})
    finally:
        model.unpatch_model()


def test_linear_attention_stands_at_every_site(demo):
    model, sites, pack = demo
    mixers = linear_mixers(sites, model.model)
    before = run(model)
    calls = []
    for site, mixer in mixers.items():
        mixer.register_forward_hook(lambda *_, site=site: calls.append(site))
    student = run(put_linear(model, mixers, pack))
    assert sorted(calls) == sorted(sites)
    assert (student - before).abs().max() > 1e-3
    assert torch.equal(run(model), before)


def test_projections_are_the_attentions_own(demo):
    model, sites, _ = demo
    for site, mixer in linear_mixers(sites, model.model).items():
        attention = model.model.get_submodule(sites[site].path)
        assert torch.equal(mixer.to_v.weight, attention.to_v.weight)
        assert torch.equal(mixer.to_out.bias, attention.to_out[0].bias)
        assert mixer.heads == attention.heads


def test_mixers_of_another_model_are_refused(demo):
    model, _, pack = demo
    with pytest.raises(CheckpointError, match="the MODEL has"):
        put_linear(model, two_mixers(), pack)


def test_students_are_told_apart_by_their_file(demo, tmp_path):
    model, sites, pack = demo
    file = tmp_path / "linear.safetensors"
    save_linear(linear_mixers(sites, model.model), file)
    plain = run(model)
    linear, deltaconv = (run(put_student(model, path, pack)) for path in (file, student_file()))
    differences = [
        (one - two).abs().max() for one, two in ((plain, linear), (plain, deltaconv), (linear, deltaconv))
    ]
    assert min(differences) > 1e-3
