"""What one batch teaches: every gradient by hand, in both stages, and nothing but the blocks changes."""

import copy

import pytest
import torch

from deltaconv_core.distill import EndToEnd, LayerWise, Settings, min_snr_weight, tapped
from testing.tiny_network import GRID, batches, make_mixers, make_network


def run(task_of, network, mixers, settings=None):
    """(losses, gradients) of one batch."""
    with tapped(network.attentions, mixers, network.grids) as taps:
        task = task_of(network, taps, settings) if settings else task_of(network, taps)
        losses = task(batches(0), lambda loss: loss.backward())
    gradients = {
        f"{site}.{name}": p.grad for site, mixer in mixers.items() for name, p in mixer.named_parameters()
    }
    return losses, gradients


def disturbed(network):
    """Mixers that do not start at the uniform attention, so that every weight has a gradient."""
    mixers = make_mixers(network)
    for mixer in mixers.values():
        torch.nn.init.normal_(mixer.conv_out.weight, std=0.3)
    return mixers


def walk(network, x, answer):
    """The tiny network by hand; `answer(i, layer, normed)` stands for its attention.

    Returns the output, and the residual stream after each attention.
    """
    x, streams = network.enter(x), []
    for i, layer in enumerate(network.layers):
        x = x + answer(i, layer, layer.norm1(x))
        streams.append(x)
        x = x + torch.tanh(layer.ff(layer.norm2(x)))
    return network.leave(x), streams


def test_layer_wise_by_hand():
    network = make_network()
    mixers = disturbed(network)
    losses, gradients = run(LayerWise, network, mixers)
    assert network.calls == 1

    again = copy.deepcopy(mixers)
    errors = []

    def attend(i, layer, normed):
        y = layer.attn1(normed)
        mixer = again[f"layers.{i}.attn1"]
        mixer.zero_grad()
        errors.append((mixer(normed.detach(), grid=GRID) - y).square().mean())
        return y

    walk(network, batches(0).noisy, attend)
    sum(errors).backward()
    torch.testing.assert_close(losses["feature"], sum(errors).detach())
    for site, mixer in again.items():
        for name, parameter in mixer.named_parameters():
            torch.testing.assert_close(gradients[f"{site}.{name}"], parameter.grad)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("feature", ["output", "residual"])
def test_end_to_end_by_hand(feature, checkpointing):
    network = make_network()
    mixers = disturbed(network)
    before = copy.deepcopy(network.state_dict())
    settings = Settings(feature=feature, checkpointing=checkpointing, beta=0.3)
    losses, gradients = run(EndToEnd, network, mixers, settings)

    again = copy.deepcopy(mixers)
    batch, answers = batches(0), {"attention": [], "mixer": []}

    def attend(i, layer, normed):
        answers["attention"].append(layer.attn1(normed))
        return answers["attention"][-1]

    def mix(i, layer, normed):
        answers["mixer"].append(again[f"layers.{i}.attn1"](normed, grid=GRID))
        return answers["mixer"][-1]

    for mixer in again.values():
        mixer.zero_grad()
    with torch.no_grad():
        teacher, teacher_streams = walk(network, batch.noisy, attend)
    student, streams = walk(network, batch.noisy, mix)
    pairs = zip(answers["mixer"], answers["attention"], strict=True)
    if feature == "residual":
        pairs = zip(streams, teacher_streams, strict=True)
    weight = min_snr_weight(batch.snr).view(-1, 1, 1)
    expected = {
        "teacher": (weight * (student - teacher).square()).mean(),
        "noise": (weight * (student - batch.target).square()).mean(),
        "feature": sum((a - b).square().mean() for a, b in pairs),
    }
    (expected["teacher"] + expected["noise"] + 0.3 * expected["feature"]).backward()
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value.detach())
    for site, mixer in again.items():
        for name, parameter in mixer.named_parameters():
            assert parameter.grad.abs().max() > 0
            torch.testing.assert_close(gradients[f"{site}.{name}"], parameter.grad)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(hook for layer in network.layers for hook in layer.norm2._forward_pre_hooks)
    assert not any("forward" in module.__dict__ for module in network.modules())


def test_checkpointing_keeps_less_for_the_backward_pass():
    def kept(checkpointing):
        sizes = []
        network = make_network()
        mixers = disturbed(network)
        with (
            tapped(network.attentions, mixers, network.grids) as taps,
            torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t),
        ):
            EndToEnd(network, taps, Settings(checkpointing=checkpointing))(batches(0), lambda loss: None)
        return sum(sizes)

    assert kept(True) < kept(False) / 3


def test_an_error_in_the_network_takes_everything_off_again():
    network = make_network()
    mixers = make_mixers(network)

    def broken(batch):
        type(network).forward(network, batch)
        raise RuntimeError("out of memory")

    network.forward = broken
    settings = Settings(feature="residual")
    with pytest.raises(RuntimeError, match="out of memory"):
        run(EndToEnd, network, mixers, settings)
    assert not any("forward" in module.__dict__ for module in network.layers.modules())
    assert not any(hook for layer in network.layers for hook in layer.norm2._forward_pre_hooks)
