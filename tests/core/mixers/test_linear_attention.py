"""Linear attention against its formula, written token by token; its start; its cost."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from deltaconv_core.errors import DeltaConvError
from deltaconv_core.mixers.linear_attention import LinearAttention
from testing.compare import relative_l2


def seeded(dim, heads, inner=None, bias=False):
    torch.manual_seed(dim * heads)
    mixer = LinearAttention(dim, heads, inner, bias)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return mixer


def by_hand(mixer, x):
    """The formula of the module's docstring in float64, one token and one head at a time."""
    w = {name: tensor.double() for name, tensor in mixer.state_dict().items()}

    def affine(name, u):
        return w[f"{name}.weight"] @ u + w.get(f"{name}.bias", torch.zeros((), dtype=torch.float64))

    def shifted(name, u):
        h = affine(f"{name}.first", u)
        h = (h - h.mean()) / (h.var(unbiased=False) + 1e-5).sqrt()
        h = h * w[f"{name}.norm.weight"] + w[f"{name}.norm.bias"]
        return u + affine(f"{name}.last", torch.where(h > 0, h, 0.01 * h))

    def phi(u):
        return torch.where(u > 0, u + 1, u.exp())

    out = torch.empty(x.shape, dtype=torch.float64)
    for b, tokens in enumerate(x.double()):
        q = [phi(affine("to_q", shifted("shift_q", u))).chunk(mixer.heads) for u in tokens]
        k = [phi(affine("to_k", shifted("shift_k", u))).chunk(mixer.heads) for u in tokens]
        v = [affine("to_v", u).chunk(mixer.heads) for u in tokens]
        for i in range(len(tokens)):
            heads = []
            for h in range(mixer.heads):
                scores = [q[i][h] @ k[j][h] / len(tokens) for j in range(len(tokens))]
                mixed = sum(score * v[j][h] for j, score in enumerate(scores))
                heads.append(mixed / (sum(scores) + 1e-4))
            out[b, i] = affine("to_out", torch.cat(heads))
    return out


@pytest.mark.parametrize(
    ("dim", "heads", "inner", "bias"), [(8, 2, None, False), (6, 3, 12, True), (5, 1, None, True)]
)
@pytest.mark.parametrize("grid", [(3, 5), (1, 7), (1, 1)])
def test_equals_the_formula(dim, heads, inner, bias, grid):
    mixer = seeded(dim, heads, inner, bias)
    x = torch.randn(2, math.prod(grid), dim)
    torch.testing.assert_close(mixer(x, grid=grid).double(), by_hand(mixer, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_stays_close_and_keeps_its_dtype(dtype, tolerance):
    mixer = seeded(16, 2)
    x = torch.randn(1, 33 * 31, 16)
    expected, y = mixer(x, grid=(33, 31)), mixer(x.to(dtype), grid=(33, 31))
    assert y.dtype == dtype
    assert relative_l2(y, expected) < tolerance
    y = mixer.to(dtype)(x, grid=(33, 31))  # weights stored in half, as in a file
    assert y.dtype == torch.float32
    assert relative_l2(y, expected) < tolerance


@pytest.mark.parametrize("biased", [False, True])
def test_starts_as_the_attention_with_another_kernel(biased):
    torch.manual_seed(0)
    layers = [nn.Linear(8, 12, bias=biased) for _ in range(3)]
    to_out = nn.Linear(12, 8, bias=biased)
    mixer = LinearAttention.from_attention(*layers, to_out, heads=3)
    x = torch.randn(2, 15, 8)
    q, k, v = (layer(x).unflatten(2, (3, -1)).transpose(1, 2) for layer in layers)
    scores = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(2, 3) / 15
    expected = to_out((scores @ v / (scores.sum(3, keepdim=True) + 1e-4)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixer(x, grid=(3, 5)), expected)
    with torch.no_grad():
        mixer.to_v.weight.zero_()
    assert layers[2].weight.abs().sum() > 0  # a copy: training it leaves the teacher alone


def test_every_weight_gets_a_gradient():
    mixer = seeded(8, 2)
    mixer(torch.randn(1, 15, 8), grid=(3, 5)).square().mean().backward()
    assert all(
        parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in mixer.parameters()
    )


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("side", [16, 64])
def test_memory_is_linear_in_the_number_of_tokens(side):
    with torch.no_grad(), Largest() as seen:
        LinearAttention(8, 2)(torch.randn(1, side**2, 8), grid=(side, side))
    assert seen.elements == side**2 * 8


@pytest.mark.parametrize("x", [torch.zeros(1, 14, 8), torch.zeros(1, 15, 7), torch.zeros(1, 15, 8).int()])
def test_refuses_tokens_that_do_not_fit(x):
    with pytest.raises(DeltaConvError, match="3 x 5, 8"):
        LinearAttention(8, 2)(x, grid=(3, 5))


def test_refuses_heads_that_do_not_divide():
    with pytest.raises(DeltaConvError, match=r"8 channels, got 3"):
        LinearAttention(8, 3)
