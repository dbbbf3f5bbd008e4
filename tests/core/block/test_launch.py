"""Direct launches of Triton kernels: they pass what triton's own pass, and only where that is certain."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os

import pytest
import torch

from deltaconv_core import BlockSpec, DeltaConvBlock
from testing.without_gpu import launched_kernels, stand_in

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="kernels are interpreted"),
]
PACKAGE = "deltaconv_core.block.ops.triton"


def of_triton(name):
    return importlib.import_module(f"{PACKAGE}.{name}")


@pytest.fixture
def launches():
    with stand_in() as launches:
        launches.kept = True
        yield launches


def plain(arguments):
    """Tensors as their addresses."""
    return [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]


def is_direct(call):
    return not any(isinstance(argument, torch.Tensor) for argument in call[2])


def pooled(x):
    return of_triton("pool").average(x, (2, 2))


def test_each_kernel_is_given_the_same_by_triton_and_directly(launches, monkeypatch):
    kernel_class = of_triton("launch").LaunchedKernel
    original = kernel_class.launch

    def three_times(self, *arguments):
        for _ in range(3):
            original(self, *arguments)

    monkeypatch.setattr(kernel_class, "launch", three_times)
    weight_gradient = of_triton("depthwise_gate")._weight_gradient
    monkeypatch.setattr(weight_gradient.tuner, "configs", weight_gradient.tuner.configs[:1])
    block = DeltaConvBlock(BlockSpec(64, 3, depthwise_bias=True))
    block(torch.randn(2, 35, 64, requires_grad=True), (5, 7)).sum().backward()
    with torch.inference_mode():
        block(torch.randn(2, 35, 64), (5, 7))

    names = set()
    for first, second, third in zip(*(launches.calls[i::3] for i in range(3)), strict=True):
        assert is_direct(third)
        assert first[:2] == second[:2] == third[:2]
        assert plain(first[2]) == plain(second[2]) == list(third[2])
        if not is_direct(first):
            names.add(first[0])
    assert len(names) == len(launched_kernels())


@pytest.mark.parametrize("options", [{}, {"depthwise_bias": True}, {"scales": (0.5, 1.0, 0.25)}], ids=str)
def test_a_tape_passes_what_single_launches_pass(launches, monkeypatch, options):
    inference, tapes = of_triton("inference"), []
    original = inference.taped

    def kept(recorded, inputs, result):
        tapes.append((recorded, [*inputs, result], original(recorded, inputs, result)))
        return tapes[-1][2]

    monkeypatch.setattr(inference, "taped", kept)
    block = DeltaConvBlock(BlockSpec(64, 3, **options)).requires_grad_(False)
    x = torch.randn(2, 35, 64)
    with torch.inference_mode():
        for _ in range(4):
            y = block(x, (5, 7))
    assert [tape is not None for _, _, tape in tapes] == [False, False, True]
    recorded, known, _ = tapes[-1]
    # The third call launches directly, plays the tape, and has triton launch; the fourth plays the tape.
    once, _, by_triton, again = (launches.calls[len(recorded) * i :][: len(recorded)] for i in range(-4, 0))
    assert [call[:2] for call in by_triton] == [call[:2] for call in once]
    assert not any(map(is_direct, by_triton))
    moved = {}  # the beginning of each tensor -> where it is on the tape
    sizes = {}
    for (_, tensors), first, second in zip(recorded, once, again, strict=True):
        count = len(tensors)
        assert is_direct(second) and first[:2] == second[:2] and first[2][count:] == second[2][count:]
        for tensor, before, after in zip(tensors, first[2], second[2], strict=False):
            assert tensor.data_ptr() == before and moved.setdefault(before, after) == after
            sizes[after] = tensor.nbytes
    fixed = [t for t in known[:-1] if t.data_ptr() != known[1].data_ptr()]  # all but u, which is made again
    assert all(moved.get(t.data_ptr(), t.data_ptr()) == t.data_ptr() for t in fixed)
    assert moved[known[-1].data_ptr()] == y.data_ptr()
    assert len(set(moved.values())) == len(moved)
    made = sorted(set(moved.values()) - set(moved))
    assert made and all(a + sizes[a] <= b for a, b in itertools.pairwise(made))


def test_another_result_than_by_triton_ends_direct_launches(launches, monkeypatch, caplog):
    inference, kernel_class = of_triton("inference"), of_triton("launch").LaunchedKernel
    monkeypatch.setattr(inference, "is_right", lambda y, truth: False)
    monkeypatch.setattr(kernel_class, "trusted", True)
    block = DeltaConvBlock(BlockSpec(64, 3)).requires_grad_(False)
    with torch.inference_mode():
        for _ in range(3):
            block(torch.randn(2, 35, 64), (5, 7))
        before = len(launches.calls)
        for _ in range(2):
            block(torch.randn(2, 35, 64), (5, 7))
    assert caplog.text.count("gave another result than triton's own, for tokens of shape (2, 35, 64)") == 1
    assert launches.calls[before:] and not any(map(is_direct, launches.calls[before:]))


def test_results_are_compared_bit_by_bit():
    same_bits, y = of_triton("inference").same_bits, torch.tensor([1.0, float("nan")])
    assert same_bits(y, y.clone()) and not same_bits(y, torch.tensor([1.0 + 2**-23, float("nan")]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))


def test_a_changed_weight_is_read_again_by_a_tape(launches):
    block = DeltaConvBlock(BlockSpec(64, 3)).requires_grad_(False)
    with torch.inference_mode():
        for _ in range(4):
            block(torch.randn(2, 35, 64), (5, 7))
        block.conv_out = torch.nn.Linear(64, 64).requires_grad_(False)
        block(torch.randn(2, 35, 64), (5, 7))
    name, _, arguments = launches.calls[-1]
    assert name == "_project" and arguments[1] == block.conv_out.weight.data_ptr()


def test_another_size_is_not_launched_as_the_last_one(launches):
    for width in (4, 4, 4, 6):
        pooled(torch.randn(1, 4, width, 32))
    assert [is_direct(call) for call in launches.calls] == [False, False, True, False]


def test_an_address_of_another_alignment_is_not_launched_as_others(launches):
    memory = torch.randn(1 + 4 * 4 * 32)
    for start in (0, 0, 0, 1, 1, 1):
        pooled(memory[start : start + 4 * 4 * 32].view(1, 4, 4, 32))
    assert [is_direct(call) for call in launches.calls] == [False, False, True] * 2


def test_a_profiler_sees_every_launch(launches):
    from triton import knobs

    for _ in range(3):
        pooled(torch.randn(1, 4, 4, 32))
    watching = lambda metadata: None  # noqa: E731
    knobs.runtime.launch_enter_hook.add(watching)
    try:
        pooled(torch.randn(1, 4, 4, 32))
    finally:
        knobs.runtime.launch_enter_hook.remove(watching)
    assert [is_direct(call) for call in launches.calls] == [False, False, True, False]


@pytest.mark.parametrize("difference", ["no hooks", "no launcher", "other arguments", "ROCm"])
def test_a_triton_that_differs_launches_as_ever(launches, monkeypatch, difference):
    launch = of_triton("launch")
    if difference == "no hooks":
        monkeypatch.setattr(launch, "runtime", None)
    elif difference == "no launcher":
        monkeypatch.setattr(launch, "_can_be_watched", lambda kernel: hasattr(kernel, "of another name"))
    elif difference == "other arguments":
        original = launch._repeated
        monkeypatch.setattr(
            launch,
            "_repeated",
            lambda kernel, run, passed, tensors: original(kernel, run, passed[1:], tensors),
        )
    else:
        monkeypatch.setattr(torch.version, "hip", "6.4")
    for _ in range(4):
        pooled(torch.randn(1, 4, 4, 32))
    assert [is_direct(call) for call in launches.calls] == [False] * 4


def test_what_is_remembered_has_a_limit(launches, monkeypatch):
    monkeypatch.setattr(of_triton("launch"), "MOST_KEYS", 3)
    kernel = of_triton("pool")._pool
    for width in range(4, 20):
        for _ in range(3):
            pooled(torch.randn(1, 4, width, 32))
    assert len(launches.calls) == 48 and len(kernel.compiled) <= 3 and len(kernel.direct) <= 3
