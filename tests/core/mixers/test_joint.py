"""The joint mixer against its slow reference, where it is attention, and in what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv2d, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from deltaconv_core import DeltaConvError
from deltaconv_core.mixers.hybrid import windowed
from deltaconv_core.mixers.joint import JointLayout, JointMixer, JointSpec, tiles
from deltaconv_core.mixers.joint.place import refusal_of_mask
from deltaconv_core.mixers.joint.reference import reference_joint
from deltaconv_core.mixers.joint.tiles import tiled_convolution

HEADS, WIDTH = 4, 4
KERNELS = {"kernel_size": 3, "scales": (1.0, 0.5)}
KINDS = {
    "landmarks": {"kernel_size": 0},
    "kernels": KERNELS,
    "window": {"kernel_size": 0, "window": 3},
    "window, kernels": KERNELS | {"window": 3},
}
GRIDS = [(4, 6), (5, 7), (1, 3), (1, 1)]
PLACES = {
    "text first": {"before": 5},
    "image first": {"after": 4},
    "references after": {"before": 3, "after": 9},
    "image alone": {},
    "keys without queries": {"before": 3, "more_keys": 6},
    "fewer key heads": {"before": 3, "key_heads": 2},
}
MASKS = ["none", "of keys", "hidden keys", "of queries and keys", "hidden from queries"]


def spec_of(kind, **changes):
    return JointSpec(16, HEADS, WIDTH, **{"landmarks": 6, **KINDS[kind], **changes})


def mixer_of(spec, dtype=torch.float32):
    """With parameters that matter."""
    mixer, generator = JointMixer(spec, dtype=dtype), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return mixer


def tokens(grid, before=0, after=0, more_keys=0, key_heads=HEADS, dtype=torch.float32, batch=2):
    """Queries, keys, values, and the layout that they have."""
    generator, queries = torch.Generator().manual_seed(0), before + grid[0] * grid[1] + after
    q = torch.randn(batch, HEADS, queries, WIDTH, generator=generator)
    k, v = torch.randn(2, batch, key_heads, queries + more_keys, WIDTH, generator=generator)
    return [t.to(dtype) for t in (q, k, v)], JointLayout(grid, before)


def mask_of(how, q, k, layout):
    """A mask under which all of the image is shown alike to each of its queries."""
    if how == "none":
        return None
    generator, image = torch.Generator().manual_seed(2), layout.image
    noise = torch.randn(len(q), 1, 1 if "of keys" in how or "hidden keys" in how else q.shape[2], k.shape[2],
                        generator=generator)  # fmt: skip
    if noise.shape[2] > 1:
        noise[:, :, image, image] = noise[:, :, image, image.start : image.start + 1]
    if "hidden" not in how:
        return noise.to(q.dtype)
    seen = noise > -0.5
    seen[..., image.start] = True
    if noise.shape[2] > 1:
        seen[:, :, image, image] = seen[:, :, image, image.start : image.start + 1]
    return seen


def full_attention(q, k, v, mask=None):
    more = q.shape[1] // k.shape[1]
    k, v = (part[:, :, None].expand(-1, -1, more, -1, -1).flatten(1, 2) for part in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference(kind, grid, place, mask):
    qkv, layout = tokens(grid, **PLACES[place])
    mixer, some = mixer_of(spec_of(kind)), mask_of(mask, *qkv[:2], layout)
    wanted = reference_joint(*qkv, grid, layout.start, mixer.spec, mixer.state_dict(), some)
    torch.testing.assert_close(mixer(*qkv, layout, some), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("place", ["references after", "fewer key heads"])
@pytest.mark.parametrize("at_once", ["one", "row"])
def test_tiles_of_a_window_fit_together(at_once, place, mask, monkeypatch):
    """One after the other as on CPUs, and as GPUs run them."""
    if at_once == "row":
        monkeypatch.setattr(windowed, "tiles_at_once", lambda device, row: row)
    test_equals_the_reference("window, kernels", (17, 18), place, mask)


@pytest.mark.parametrize("mask", ["none", "of keys", "of queries and keys"])
@pytest.mark.parametrize("place", ["references after", "fewer key heads"])
@pytest.mark.parametrize("kind", ["kernels", "window, kernels"])
def test_gradients_equal_the_reference_s(kind, place, mask):
    grid = (5, 7)
    qkv, layout = tokens(grid, **PLACES[place], dtype=torch.float64)
    mixer, some = mixer_of(spec_of(kind), torch.float64), mask_of(mask, *qkv[:2], layout)
    everything = [*(t.requires_grad_() for t in qkv), *mixer.parameters()]
    found = mixer(*qkv, layout, some)
    wanted = reference_joint(*qkv, grid, layout.start, mixer.spec, dict(mixer.named_parameters()), some)
    found, wanted = (torch.autograd.grad(y.square().sum(), everything) for y in (found, wanted))
    for own, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", KINDS)
def test_with_a_landmark_for_each_token_it_is_attention(kind, grid, place, mask):
    """A fresh one: no kernels, gains of 1, nothing of the mean."""
    qkv, layout = tokens(grid, **PLACES[place])
    mixer, some = JointMixer(spec_of(kind, landmarks=grid[0] * grid[1])), mask_of(mask, *qkv[:2], layout)
    torch.testing.assert_close(mixer(*qkv, layout, some), full_attention(*qkv, some), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["window", "window, kernels"])
def test_with_a_window_over_the_image_it_is_attention(kind, place, mask):
    """Whatever the parameters: nothing is left to landmarks and kernels."""
    qkv, layout = tokens((4, 6), **PLACES[place])
    mixer, some = mixer_of(spec_of(kind, window=11)), mask_of(mask, *qkv[:2], layout)
    torch.testing.assert_close(mixer(*qkv, layout, some), full_attention(*qkv, some), rtol=1e-5, atol=1e-5)
    narrower = mixer_of(spec_of(kind, window=5))
    assert not torch.allclose(narrower(*qkv, layout, some), full_attention(*qkv, some), atol=1e-2)


@pytest.mark.parametrize("grid", [(7, 9), (8, 12)])
@pytest.mark.parametrize("kind", ["kernels", "window"])
def test_is_attention_where_keys_do_not_vary_within_cells(kind, grid):
    """Whatever the sizes of the cells: on 7 x 9 tokens they have 6, 8, 9 and 12."""
    from deltaconv_core.mixers.hybrid.reference import cells_of

    (q, k, v), layout = tokens(grid, before=3, after=2)
    for cell in cells_of(grid, 6):
        for t in (k[:, :, layout.image], v[:, :, layout.image]):
            t[:, :, cell] = t[:, :, cell[:1]]
    mixed = JointMixer(spec_of(kind))(q, k, v, layout)
    torch.testing.assert_close(mixed, full_attention(q, k, v), rtol=1e-5, atol=1e-5)


def test_other_queries_are_answered_by_the_attention_that_is_given():
    """Whatever the mixer's parameters, and with the mask's own rows."""
    qkv, layout = tokens((5, 7), before=3, after=4)
    mask = mask_of("of queries and keys", *qkv[:2], layout)
    asked = []

    def attend(q, k, v, mask):
        asked.append((q.shape[2], k.shape[2], mask.shape[2]))
        return full_attention(q, k, v, mask)

    mixed = mixer_of(spec_of("kernels"))(*qkv, layout, mask, attend)
    full = full_attention(*qkv, mask)
    assert asked == [(7, 42, 7)]
    torch.testing.assert_close(mixed[:, :, :3], full[:, :, :3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[:, :, -4:], full[:, :, -4:], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mixed[:, :, layout.image], full[:, :, layout.image], atol=1e-2)


@pytest.mark.parametrize("kind", ["kernels", "window, kernels"])
def test_hidden_keys_have_no_influence(kind):
    (q, k, v), layout = tokens((5, 7), before=3, after=4)
    mask, mixer = mask_of("hidden keys", q, k, layout), mixer_of(spec_of(kind))
    hidden = ~mask[:, 0, 0, :, None][:, None]
    before = mixer(q, k, v, layout, mask)
    after = mixer(q, k.masked_fill(hidden, 7.0), v.masked_fill(hidden, 7.0), layout, mask)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_where_the_image_has_no_mass_kernels_do_not_act():
    """All attention goes to one token of the text, as to the sinks of real models."""
    (q, k, v), layout = tokens((5, 7), before=3)
    k[:, :, 0] = 0
    mask = torch.zeros(1, 1, 1, k.shape[2])
    mask[..., 0] = 100.0
    mixed = mixer_of(spec_of("kernels"))(q, k, v, layout, mask)
    torch.testing.assert_close(mixed, v[:, :, :1].expand_as(q), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("samples", [slice(0, 1), slice(1, 2)])
@pytest.mark.parametrize("kind", ["kernels", "window, kernels"])
def test_samples_of_a_batch_do_not_see_each_other(kind, samples):
    """With and without prompt in one call."""
    qkv, layout = tokens((5, 7), before=3, after=2)
    mixer, mask = mixer_of(spec_of(kind)), mask_of("of keys", *qkv[:2], layout)
    whole = mixer(*qkv, layout, mask)[samples]
    alone = mixer(*(t[samples] for t in qkv), layout, mask[samples])
    torch.testing.assert_close(alone, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", ["none", "of keys", "of queries and keys"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("landmarks", [6, 384])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_errs_as_attention_does(kind, landmarks, dtype, mask):
    """At most twice as far from the same in float64 as attention in the same dtype is. Beside a window the
    landmarks' weights have that dtype too."""
    qkv, layout = tokens((16, 24), before=20, dtype=dtype)
    mixer, some = JointMixer(spec_of(kind, landmarks=landmarks)), mask_of(mask, *qkv[:2], layout)
    given = [*(t.double() for t in qkv), None if some is None else some.double()]
    own, theirs = (
        (y.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        for y, exact in (
            (mixer(*qkv, layout, some), mixer(*given[:3], layout, given[3])),
            (full_attention(*qkv, some), full_attention(*given)),
        )
    )
    assert mixer(*qkv, layout, some).dtype == dtype
    assert own <= (5 if mixer.spec.window and landmarks == 6 else 2) * theirs


def test_hidden_keys_of_wide_heads_stay_within_float16():
    mixer, layout = JointMixer(JointSpec(512, 2, 256, landmarks=6, kernel_size=0)), JointLayout((5, 6), 4)
    q, k, v = torch.randn(3, 1, 2, 34, 256, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(34)[None, None, None] != 2
    y = mixer(q.half(), k.half(), v.half(), layout, mask)
    torch.testing.assert_close(y.float(), mixer(q, k, v, layout, mask), rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("size", [1, 3, 9])
@pytest.mark.parametrize("grid", [(16, 32), (5, 7), (17, 33), (1, 1)])
def test_kernels_by_tiles_are_the_convolution(grid, size, monkeypatch):
    """As GPUs run them: forward and gradients."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, HEADS, *grid, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    kernels = torch.randn(HEADS, size, size, generator=generator, dtype=torch.float64).requires_grad_()
    weight = kernels[:, None].repeat_interleave(WIDTH, dim=0)
    flat = image.permute(0, 1, 4, 2, 3).flatten(1, 2)
    wanted = conv2d(flat, weight, padding=size // 2, groups=HEADS * WIDTH)
    wanted = wanted.unflatten(1, (HEADS, WIDTH)).permute(0, 1, 3, 4, 2)
    found = tiled_convolution(image, kernels)
    torch.testing.assert_close(found, wanted)
    monkeypatch.setattr(tiles, "ENTRIES", 1)  # head by head
    torch.testing.assert_close(tiled_convolution(image, kernels), wanted)
    own, other = (torch.autograd.grad(y.square().sum(), (image, kernels)) for y in (found, wanted))
    for a, b in zip(own, other, strict=True):
        torch.testing.assert_close(a, b)


class Largest(TorchDispatchMode):
    """The most elements that any tensor had."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.most = max(self.most, t.numel())
        return out


@pytest.mark.parametrize("mask", ["none", "of keys"])
@pytest.mark.parametrize("grid", [(48, 32), (47, 33)])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_grows_with_the_square_of_the_image(kind, grid, mask, monkeypatch):
    """No tensor is larger than all tokens are, or the scores of a row of the window's tiles."""
    monkeypatch.setattr(windowed, "tiles_at_once", lambda device, row: row)
    qkv, layout = tokens(grid, before=5, batch=1)
    some, mixer = mask_of(mask, *qkv[:2], layout), mixer_of(spec_of(kind))
    with Largest() as seen:
        mixer(*qkv, layout, some)
    row = 3 * 256 * HEADS * (18**2 + 5 + 6) if mixer.spec.window else 0
    assert seen.most <= max(3 * qkv[0].shape[2] * HEADS * (WIDTH + 8), row)


@pytest.mark.parametrize("mask", [None, torch.ones(1, 1, 1, 40, dtype=torch.bool)])
def test_a_mask_of_the_keys_is_no_obstacle(mask):
    assert refusal_of_mask(mask, JointLayout((5, 7), 5)) == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda q, k, v: (q[:, :3], k, v, None), "whose heads divide 4"),
        (lambda q, k, v: (q, k[..., :2], v[..., :2], None), "whose heads divide 4"),
        (lambda q, k, v: (q, k[:, :3], v[:, :3], None), "whose heads divide 4"),
        (lambda q, k, v: (q[:, :, :36], k, v, None), "expected at least 38 queries and keys"),
        (lambda q, k, v: (q, k[:, :, :37], v[:, :, :37], None), "expected at least 38 queries and keys"),
        (lambda q, k, v: (q.long(), k, v, None), "floating point tokens"),
        (lambda q, k, v: (q, k, v, torch.zeros(1, 1, 1, 37)), "expected a mask of"),
        (lambda q, k, v: (q, k, v, torch.zeros(1, 1, 5, 38)), "expected a mask of"),
        (lambda q, k, v: (q, k, v, torch.zeros(1, HEADS, 1, 38)), "differs between heads"),
        (lambda q, k, v: (q, k, v, torch.eye(38)), "only parts of the image"),
    ],
)
def test_what_does_not_fit_is_refused(change, said):
    (q, k, v), layout = tokens((5, 7), before=3)
    *qkv, mask = change(q, k, v)
    with pytest.raises(DeltaConvError, match=said):
        JointMixer(spec_of("kernels"))(*qkv, layout, mask)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"landmarks": 0}, "landmarks"),
        ({"kernel_size": 4}, "kernel_size to be odd"),
        ({"window": 4}, "window to be odd"),
        ({"window": 257}, "window"),
        ({"scales": ()}, "scales"),
        ({"kernel_size": 300}, "kernel_size"),
    ],
)
def test_nonsense_is_refused_when_a_spec_is_built(values, said):
    with pytest.raises(DeltaConvError, match=said):
        spec_of("kernels", **values)


def test_a_place_that_cannot_be_is_refused():
    with pytest.raises(DeltaConvError, match="at least 1 x 1 tokens after 0 or more"):
        JointLayout((5, 7), -1)


def test_a_spec_survives_json():
    spec = spec_of("kernels")
    assert JointSpec.from_dict(spec.to_dict()) == spec
    assert sum(p.numel() for p in JointMixer(spec).parameters()) == spec.num_parameters
    with pytest.raises(DeltaConvError, match="unknown \\['prompt'\\]"):
        JointSpec.from_dict({**spec.to_dict(), "prompt": 3})


def test_an_empty_batch_stays_one():
    qkv, layout = tokens((5, 7), before=3, batch=0)
    for kind in KINDS:
        assert mixer_of(spec_of(kind))(*qkv, layout).shape == qkv[0].shape


@pytest.mark.parametrize("queries", [1, 6 + 17 * 18])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_that_puts_all_keys_far_below_zero_hides_none(kind, queries):
    (q, k, v), layout = tokens((17, 18), before=6)
    mixer, low = mixer_of(spec_of(kind)), torch.full((1, 1, queries, k.shape[2]), -6000.0)
    torch.testing.assert_close(mixer(q, k, v, layout, low), mixer(q, k, v, layout), rtol=1e-3, atol=1e-3)


def test_what_a_tile_sees_beyond_a_window_stays_hidden_where_all_of_the_image_is():
    """Queries that see no key but the image's, which is hidden from them."""
    (q, k, v), layout = tokens((17, 18), before=6)
    mask = torch.zeros(1, 1, q.shape[2], k.shape[2])
    mask[:, :, layout.image, layout.image] = -5000.0
    mask[:, :, layout.image, :6] = -torch.inf
    mixer = mixer_of(spec_of("window"))
    wanted = mixer(*(t[:, :, 6:] for t in (q, k, v)), JointLayout((17, 18)))
    torch.testing.assert_close(mixer.image(q[:, :, 6:], k, v, layout, mask), wanted, rtol=1e-3, atol=1e-3)
