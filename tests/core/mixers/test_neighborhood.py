"""Neighborhood attention against full attention with a mask that follows its definition."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from deltaconv_core import DeltaConvError
from deltaconv_core.mixers.neighborhood import neighborhood_attention
from testing.attention_maps import places


def tensors(grid, batch=2, heads=3, dim=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shape = (3, batch, heads, grid[0] * grid[1], dim)
    return torch.randn(shape, generator=generator).to(dtype).unbind()


def by_definition(q, k, v, grid, kernel_size):
    """Every logit, those of keys outside the window taken out."""
    at = places(grid)
    seen = (at[:, None] - at[None]).abs().amax(dim=2) < kernel_size / 2
    logits = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    return logits.softmax(dim=-1) @ v


GRIDS = [(5, 7), (16, 16), (17, 33), (40, 3), (1, 20), (35, 18)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kernel_size", [1, 3, 7, 13])
def test_is_attention_with_a_mask(grid, kernel_size):
    q, k, v = tensors(grid)
    expected = by_definition(q, k, v, grid, kernel_size)
    assert torch.allclose(neighborhood_attention(q, k, v, grid, kernel_size), expected, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
def test_is_full_attention_when_the_kernel_covers_the_grid(grid):
    q, k, v = tensors(grid)
    full = scaled_dot_product_attention(q, k, v)
    covering = 2 * max(grid) - 1
    assert torch.allclose(neighborhood_attention(q, k, v, grid, covering), full, atol=1e-5)
    if covering > 1:
        assert not torch.allclose(neighborhood_attention(q, k, v, grid, covering - 2), full, atol=1e-5)


def test_kernel_of_one_gives_the_values():
    q, k, v = tensors((6, 5))
    assert torch.allclose(neighborhood_attention(q, k, v, (6, 5), 1), v, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """No more than twice the error of full attention in the same dtype."""
    grid = (19, 14)
    q, k, v = tensors(grid, dtype=dtype)
    exact = by_definition(q.float(), k.float(), v.float(), grid, 7)
    own = neighborhood_attention(q, k, v, grid, 7)
    assert own.dtype == dtype
    full = scaled_dot_product_attention(q, k, v).float()
    error = (full - scaled_dot_product_attention(q.float(), k.float(), v.float())).abs().max()
    assert (own.float() - exact).abs().max() < max(2 * error, 2 * exact.abs().max() * torch.finfo(dtype).eps)


def test_gradients():
    q, k, v = (t.double().requires_grad_() for t in tensors((18, 5), batch=1, heads=1, dim=4))
    wanted = torch.autograd.grad(by_definition(q, k, v, (18, 5), 5).square().sum(), (q, k, v))
    found = torch.autograd.grad(neighborhood_attention(q, k, v, (18, 5), 5).square().sum(), (q, k, v))
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-9)


@pytest.mark.parametrize("kernel_size", [0, 4, -3])
def test_refuses_even_kernels(kernel_size):
    with pytest.raises(DeltaConvError, match=f"odd kernel_size of at least 1, got {kernel_size}"):
        neighborhood_attention(*tensors((4, 4)), (4, 4), kernel_size)


def test_refuses_tokens_that_do_not_fit():
    with pytest.raises(
        DeltaConvError, match="expected 5 x 4 = 20 queries, keys and values, got 16, 16 and 16"
    ):
        neighborhood_attention(*tensors((4, 4)), (5, 4), 3)
