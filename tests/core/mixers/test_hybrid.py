"""The hybrid mixer against its slow reference, where it is attention, and in what it refuses."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from deltaconv_core import DeltaConvError
from deltaconv_core.mixers.hybrid import HybridMixer, HybridSpec, nystrom
from deltaconv_core.mixers.hybrid.cells import Cells
from deltaconv_core.mixers.hybrid.landmarks import own_share
from deltaconv_core.mixers.hybrid.nystrom import RIDGE, solved, solved_by_products
from deltaconv_core.mixers.hybrid.reference import cells_of, reference_hybrid
from testing.compare import relative_l2

POOLED = {"landmarks": 6, "nystrom": "none"}
LOCAL = {"kernel_size": 3, "scales": (1.0, 0.5), "mean": True}
KINDS = {
    "pooled": POOLED,
    "pooled, local": POOLED | LOCAL,
    "pooled, local by channel": POOLED | LOCAL | {"share": "channel"},
    "pooled, gate": POOLED | LOCAL | {"gate": True},
    "window": POOLED | {"window": 3, "mean": True},
    "window, local": POOLED | LOCAL | {"window": 5},
    "Nyström, Cholesky": {"landmarks": 6, "nystrom": "cholesky"},
    "Nyström, Newton, local": {"landmarks": 6, "nystrom": "newton"} | LOCAL,
    "local": {"landmarks": 0, "nystrom": "none"} | LOCAL,
    "mean": {"landmarks": 0, "nystrom": "none", "mean": True},
}
GRIDS = [(4, 6), (5, 7), (1, 3), (1, 1)]
HEADS, WIDTH = 2, 4


def spec_of(kind, **changes):
    return HybridSpec(dim=8, heads=HEADS, head_dim=WIDTH, **{**KINDS[kind], **changes})


def mixer_of(spec, dtype=torch.float32):
    """With parameters that matter."""
    mixer = HybridMixer(spec, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return mixer


def tokens(grid, batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shape = (3, batch, HEADS, grid[0] * grid[1], WIDTH)
    return torch.randn(shape, generator=generator).to(dtype).unbind()


def mask_of(how, grid, batch=2):
    if how == "none":
        return None
    noise = torch.randn(batch, grid[0] * grid[1], generator=torch.Generator().manual_seed(2))
    if how == "added":
        return noise
    seen = noise > -0.3
    seen[:, 0] = True
    return seen


@pytest.mark.parametrize("mask", ["none", "bool", "added"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference(kind, grid, mask):
    mixer, some = mixer_of(spec_of(kind)), mask_of(mask, grid)
    wanted = reference_hybrid(*tokens(grid), grid, mixer.spec, mixer.state_dict(), some)
    torch.testing.assert_close(mixer(*tokens(grid), grid, some), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", ["none", "added"])
def test_tiles_of_a_window_fit_together(mask):
    grid = (17, 18)
    test_equals_the_reference("window", grid, mask)


@pytest.mark.parametrize("mask", ["none", "bool"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_the_reference_s(kind, mask):
    grid = (5, 7)
    mixer, some = mixer_of(spec_of(kind), torch.float64), mask_of(mask, grid)
    inputs = [t.requires_grad_() for t in tokens(grid, dtype=torch.float64)]
    everything = [*inputs, *mixer.parameters()]
    found = mixer(*inputs, grid, some)
    wanted = reference_hybrid(*inputs, grid, mixer.spec, dict(mixer.named_parameters()), some)
    found, wanted = (
        torch.autograd.grad(y.square().sum(), everything, materialize_grads=True) for y in (found, wanted)
    )
    for own, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (1, 9)])
@pytest.mark.parametrize("kind", ["pooled", "window", "Nyström, Cholesky", "Nyström, Newton, local"])
def test_with_a_landmark_for_each_token_it_is_attention(kind, grid):
    """A fresh one: no kernels, and gains of 1."""
    mixer = HybridMixer(spec_of(kind, landmarks=grid[0] * grid[1]))
    full = scaled_dot_product_attention(*tokens(grid))
    torch.testing.assert_close(mixer(*tokens(grid), grid), full, rtol=1e-5, atol=1e-5)
    mask = mask_of("added", grid)
    full = scaled_dot_product_attention(*tokens(grid), attn_mask=mask[:, None, None])
    torch.testing.assert_close(mixer(*tokens(grid), grid, mask), full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", [(4, 6), (17, 18)])
def test_with_a_window_over_the_picture_it_is_attention(grid):
    mixer = HybridMixer(spec_of("window", window=2 * max(grid) - 1))
    full = scaled_dot_product_attention(*tokens(grid))
    torch.testing.assert_close(mixer(*tokens(grid), grid), full, rtol=1e-5, atol=1e-5)
    narrower = HybridMixer(spec_of("window", window=max(grid) // 2 * 2 - 3))
    assert not torch.allclose(narrower(*tokens(grid), grid), full, atol=1e-3)


@pytest.mark.parametrize("grid", [(8, 12), (9, 10), (12, 35), (6, 6)])
def test_landmarks_are_means_of_their_cells(grid):
    cells = Cells.of(grid, 30, None, torch.zeros(1, dtype=torch.float64))
    k = torch.randn(2, HEADS, grid[0] * grid[1], WIDTH, dtype=torch.float64)
    exact = [k[:, :, cell].mean(dim=2) for cell in cells_of(grid, 30)]
    torch.testing.assert_close(cells.means(k), torch.stack(exact, dim=2))


@pytest.mark.parametrize("landmarks", [1, 36, 144])
@pytest.mark.parametrize("sharpness", [0.3, 3])
def test_products_solve_as_exactly_as_cholesky_factors(landmarks, sharpness):
    torch.manual_seed(0)
    q = torch.randn(2, 3, landmarks, 8)
    a = (q @ (q + torch.randn_like(q)).mT * sharpness).softmax(dim=-1)
    m = a @ torch.randn(2, 3, landmarks, 5)
    gram, right = a.mT @ a + RIDGE * torch.eye(landmarks), a.mT @ m
    exact = torch.linalg.solve(
        a.double().mT @ a.double() + RIDGE * torch.eye(landmarks), a.double().mT @ m.double()
    )
    errors = [
        relative_l2(a @ found(gram, right), a.double() @ exact) for found in (solved, solved_by_products)
    ]
    assert errors[1] < max(2 * errors[0], 1e-6)


@pytest.mark.parametrize("grid", GRIDS)
def test_products_in_place_of_cholesky_equal_the_reference(monkeypatch, grid):
    monkeypatch.setattr(nystrom, "products_are_faster", lambda a: True)
    test_equals_the_reference("Nyström, Cholesky", grid, "none")


@pytest.mark.parametrize(
    ("place", "landmarks", "tf32", "products"),
    [
        ("cuda", 144, False, True),
        ("cuda", 576, False, False),
        ("cuda", 144, True, False),
        ("cpu", 144, False, False),
    ],
)
def test_products_are_for_gpus(monkeypatch, place, landmarks, tf32, products):
    monkeypatch.setattr(nystrom, "tf32_allowed", lambda: tf32)
    a = SimpleNamespace(is_cuda=place == "cuda", shape=(1, landmarks, landmarks))
    assert nystrom.products_are_faster(a) == products


def test_apple_s_gpus_leave_cholesky_factors_to_the_cpu():
    class Place(str):
        type = "mps"

    a = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(0))
    gram, right = a @ a.mT + torch.eye(6), a[..., :3]
    there = [SimpleNamespace(device=Place("cpu"), cpu=lambda t=t: t) for t in (gram, right)]
    torch.testing.assert_close(solved(*there), torch.linalg.solve(gram, right))


class Copies(TorchDispatchMode):
    """Keeps how many numbers each operator copies that does nothing else."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy):
            self.made.append(arguments[0].numel())
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "window" not in kind and "gate" not in kind])
@pytest.mark.parametrize("grid", [(8, 8), (8, 12), (7, 9)])
def test_views_of_projections_are_not_copied(monkeypatch, kind, grid):
    def attention(q, k, v, attn_mask=None):
        """Takes what the fast kernels of a GPU take as it is."""
        assert all(t.stride(3) == 1 and t.stride(2) % 8 == 0 for t in (q, k, v))
        return torch.zeros_like(q)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(nystrom, "products_are_faster", lambda a: True)
    mixer = HybridMixer(HybridSpec(64, 2, 32, **KINDS[kind])).requires_grad_(False)
    q, k, v = (torch.randn(2, grid[0] * grid[1], 2, 32).transpose(1, 2) for _ in range(3))
    with Copies() as copies:
        mixer(q, k, v, grid)
    assert max(copies.made, default=0) < q.numel() / 2


def test_with_one_landmark_it_is_uniform_attention():
    q, k, v = tokens((5, 7))
    mixer = HybridMixer(spec_of("pooled", landmarks=1))
    torch.testing.assert_close(mixer(q, k, v, (5, 7)), v.mean(dim=2, keepdim=True).expand(v.shape))


@pytest.mark.parametrize("kind", ["pooled", "window"])
@pytest.mark.parametrize("grid", [(7, 9), (8, 12)])
def test_is_attention_where_keys_do_not_vary_within_cells(kind, grid):
    """Whatever the sizes of the cells: on 7 x 9 tokens they have 6, 8, 9 and 12."""
    q, k, v = tokens(grid)
    for cell in cells_of(grid, 6):
        k[:, :, cell] = k[:, :, cell[:1]]
        v[:, :, cell] = v[:, :, cell[:1]]
    full = scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(HybridMixer(spec_of(kind))(q, k, v, grid), full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_are_masked_out_have_no_influence(kind):
    grid, mask = (5, 7), mask_of("bool", (5, 7))
    q, k, v = tokens(grid)
    mixer = mixer_of(spec_of(kind))
    before = mixer(q, k, v, grid, mask)
    hidden = ~mask[:, None, :, None]
    if mixer.spec.nystrom != "none":
        q = q.masked_fill(hidden, 3.0)  # the landmarks' queries are means of seen tokens
        before = before.masked_fill(hidden, 0)
    after = mixer(q, k.masked_fill(hidden, 7.0), v.masked_fill(hidden, 7.0), grid, mask)
    torch.testing.assert_close(
        after.masked_fill(hidden, 0) if mixer.spec.nystrom != "none" else after, before, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind, dtype):
    """Rounded queries, keys and values, and results that are rounded once or twice more."""
    grid = (9, 10)
    mixer = mixer_of(spec_of(kind))
    some = tokens(grid, dtype=dtype)
    exact = reference_hybrid(*some, grid, mixer.spec, mixer.state_dict())
    y = mixer(*some, grid)
    assert y.dtype == dtype
    assert (y.float() - exact).norm() / exact.norm() < 2 * torch.finfo(dtype).eps
    stored = mixer.to(dtype)(*tokens(grid), grid)  # parameters in half, as in a file
    assert stored.dtype == torch.float32


def test_the_share_of_a_query_s_own_cell_stays_within_float16():
    """Scores of 80,000 before they are divided by the root of d, as GPUs compute them in float16."""
    q, grid = torch.full((1, 1, 12, 64), 50.0), (3, 4)
    k = q * torch.linspace(0.3, 0.5, 12)[:, None]
    exact, half = (own_share(a, b, Cells.of(grid, 4, None, a)) for a, b in ((q, k), (q.half(), k.half())))
    torch.testing.assert_close(half.float(), exact, rtol=1e-2, atol=1e-3)


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_linear_in_the_number_of_tokens(kind, side):
    """No tensor is larger than the scores of all tokens and landmarks, or of a row of the window's tiles."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, HEADS, side**2, WIDTH)
    mixer = mixer_of(spec_of(kind))
    with torch.no_grad(), Largest() as seen:
        mixer(q, k, v, (side, side))
    row = side // 16 * HEADS * 256 * (20**2 + 6) if mixer.spec.window else 0
    assert seen.elements <= max(side**2 * HEADS * max(WIDTH, 6), row)


def test_every_parameter_starts_as_softmax_over_landmarks():
    grid = (5, 7)
    fresh, plain = HybridMixer(spec_of("pooled, local")), HybridMixer(spec_of("pooled"))
    assert torch.equal(fresh(*tokens(grid), grid), plain(*tokens(grid), grid))
    assert sum(p.numel() for p in fresh.parameters()) == fresh.spec.num_parameters == 2 * (1 + 2 * 9 + 1)


def test_the_same_landmarks_serve_larger_pictures():
    """A smooth picture in more pixels gives the same answer in more pixels."""
    lines = torch.linspace(0, 1, 8)
    small = torch.stack([lines[:, None] + lines, lines[:, None] * lines, lines[None] + 0 * lines[:, None]])
    small = torch.cat([small, small[:1] - small[1:2]]).reshape(1, 1, 4, 8, 8).expand(1, 2, 4, 8, 8)
    large = small.repeat_interleave(3, dim=3).repeat_interleave(3, dim=4)
    mixer = HybridMixer(spec_of("pooled", landmarks=16))
    few, many = (mixer(*[t.flatten(3).mT] * 3, t.shape[3:]) for t in (small, large))
    wider = few.mT.unflatten(3, (8, 8)).repeat_interleave(3, dim=3).repeat_interleave(3, dim=4)
    torch.testing.assert_close(many, wider.flatten(3).mT, rtol=1e-4, atol=1e-5)


def test_an_empty_batch_stays_empty():
    assert HybridMixer(spec_of("window"))(*tokens((4, 6), batch=0), (4, 6)).shape == (0, 2, 24, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 2, 34, 4)}, r"\(B, 2, 5 x 7 = 35, 4\), got \(2, 2, 34, 4\)"),
        ({"k": torch.zeros(2, 2, 36, 4)}, "merges, tiles or adds tokens"),
        ({"v": torch.zeros(2, 3, 35, 4)}, r"\(2, 3, 35, 4\)"),
        ({"q": torch.zeros(2, 2, 35, 4).int()}, "got torch.int32"),
        ({"grid": (0, 7)}, "at least 1 x 1, got 0 x 7"),
        ({"mask": torch.ones(2, 35, 35)}, r"\(2, 35\), got \(2, 35, 35\)"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    q, k, v = tokens((5, 7))
    call = {"q": q, "k": k, "v": v, "grid": (5, 7), "mask": None} | change
    with pytest.raises(DeltaConvError, match=message):
        HybridMixer(spec_of("pooled"))(**call)


@pytest.mark.parametrize("kind", KINDS)
def test_a_spec_survives_json(kind):
    spec = spec_of(kind)
    assert HybridSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.heads = 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 0}, "heads to be a whole number from 1 to 4096, got 0"),
        ({"landmarks": -1}, "landmarks to be a whole number"),
        ({"landmarks": 0, "nystrom": "none"}, "got a mixer of no part"),
        ({"nystrom": "svd"}, "nystrom to be one of none, cholesky, newton, got 'svd'"),
        ({"kernel_size": 4}, "kernel_size to be odd, or 0 for none, got 4"),
        ({"window": 2}, "window to be odd"),
        ({"scales": (2.0,)}, "0 < scale <= 1"),
        ({"share": "layer"}, "share to be one of head, channel"),
        ({"mean": 1}, "mean to be True or False, got 1"),
        ({"window": 3}, "without a window, got landmarks 144, window 3"),
        ({"landmarks": 0, "mean": True}, "landmarks and without a window, got landmarks 0"),
        ({"landmarks": 0, "nystrom": "none", "window": 3, "mean": True}, "needs landmarks"),
        ({"gate": True, "kernel_size": 3}, "a gate weighs the local part .* nystrom 'cholesky'"),
        ({"gate": True, "nystrom": "none"}, "kernel_size 0"),
    ],
)
def test_a_spec_refuses_nonsense(change, message):
    with pytest.raises(DeltaConvError, match=message):
        HybridSpec(**({"dim": 8, "heads": 2, "head_dim": 4} | change))


def test_a_spec_names_settings_it_does_not_know():
    with pytest.raises(DeltaConvError, match=r"unknown \['gates'\], missing \['head_dim', 'heads'\]|missing"):
        HybridSpec.from_dict({"dim": 8, "gates": True})
