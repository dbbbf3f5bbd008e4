"""ΔConvBlocks in place of the second attentions of SD 3.5, which are of the image alone."""

from __future__ import annotations

import pytest
import torch

from testing.comfy_joint_models import joint_sites, make_joint, make_joint_mixers, sample_joint, with_joint
from testing.comfy_models import in_pack, same_state, state
from testing.compare import largest_error

SITE = "transformer_blocks.0.attn2"


def make_blocks(pack, channels=128, **changes):
    core = in_pack(pack, "deltaconv_core")
    with torch.random.fork_rng():
        torch.manual_seed(2)
        block = core.DeltaConvBlock(core.BlockSpec(channels, 3)).requires_grad_(False)
        block.conv_out.weight *= 20
    return core.Checkpoint(changes.get("architecture", "sd3"), {SITE: block})


@pytest.fixture
def model():
    return make_joint("sd35")


def test_the_block_answers_what_the_attention_was_asked(pack, model, monkeypatch):
    """Its input and output are those of the whole attention, projections included."""
    checkpoint = make_blocks(pack, joint_sites(pack, model).channels[SITE])
    patched = with_joint(pack, model, checkpoint)
    own = model.model.diffusion_model.joint_blocks[0].x_block.attn2
    block = type(checkpoint.blocks[SITE])
    calls, grids = [], []

    def attention(self, x, grid):
        calls.append(x.shape)
        grids.append(grid)
        return own.__class__.post_attention(own, plain(*own.__class__.pre_attention(own, x)))

    def plain(q, k, v):
        from comfy.ldm.modules.attention import attention_pytorch

        return attention_pytorch(q, k, v, own.num_heads)

    before = sample_joint(model, "sd35")
    monkeypatch.setattr(block, "forward", attention)
    assert largest_error(sample_joint(patched, "sd35"), before) < 1e-5
    assert calls and set(grids) == {(6, 8)}


@pytest.mark.parametrize("size", [(12, 16), (9, 14)])
def test_blocks_change_pictures_and_come_off_again(pack, model, size):
    before, weights = sample_joint(model, "sd35", size), state(model)
    patched = with_joint(pack, model, make_blocks(pack, joint_sites(pack, model).channels[SITE]))
    assert largest_error(sample_joint(patched, "sd35", size), before) > 1e-4
    patched.detach()
    assert torch.equal(sample_joint(model, "sd35", size), before) and same_state(weights, model)
    attention = model.model.diffusion_model.joint_blocks[0].x_block.attn2
    assert not {"pre_attention", "post_attention"} & vars(attention).keys()


def test_a_range_and_an_error_leave_the_attention_as_it_was(pack, model, monkeypatch):
    checkpoint = make_blocks(pack, joint_sites(pack, model).channels[SITE])
    before = sample_joint(model, "sd35", steps=4)
    half = sample_joint(with_joint(pack, model, checkpoint, end=0.5), "sd35", steps=4)
    whole = sample_joint(with_joint(pack, model, checkpoint), "sd35", steps=4)
    assert largest_error(half, before) > 1e-5 and largest_error(half, whole) > 1e-5

    def fails(*_, **__):
        raise RuntimeError("stopped")

    patched = with_joint(pack, model, checkpoint)
    monkeypatch.setattr(type(checkpoint.blocks[SITE]), "forward", fails)
    with pytest.raises(RuntimeError, match="stopped"):
        sample_joint(patched, "sd35")
    patched.detach()
    assert torch.equal(sample_joint(model, "sd35", steps=4), before)


def test_samples_of_other_noise_levels_get_their_own_answer(pack):
    """`standing_in` with a choice for each sample."""
    model = make_joint("sd35")
    attention = model.model.diffusion_model.joint_blocks[0].x_block.attn2
    channels = joint_sites(pack, model).channels[SITE]
    x = torch.randn(2, 12, channels, generator=torch.Generator().manual_seed(0))
    usual = attention.post_attention(attention.pre_attention(x)[0])
    context = in_pack(pack, "nodes.host.patch.image_alone").standing_in
    with context(attention, lambda x, grid: 2 * x, (3, 4), [True, False]):
        got = attention.post_attention(attention.pre_attention(x)[0])
    assert torch.equal(got[0], 2 * x[0]) and torch.equal(got[1], usual[1])


def test_the_node_says_what_stands_where(pack, model):
    node = in_pack(pack, "nodes.patch_model").PatchModel
    checkpoint = make_blocks(pack, joint_sites(pack, model).channels[SITE])
    with torch.inference_mode():
        output = node.execute(model, "auto", "all", 0.0, 1.0, "apply", 1.0, deltaconv=checkpoint)
    assert "ΔConv stands in for 1 of 3 self-attentions of sd3" in output.ui.as_dict()["text"][0]


@pytest.mark.parametrize(
    ("name", "architecture", "said"),
    [
        ("sd35", "sd15", "whose attention is of text and image together"),
        ("sd3", "sd3", "whose attention is of text and image together"),
        ("flux", "sd3", "whose attention is of text and image together"),
    ],
)
def test_where_no_attention_is_of_the_image_alone_blocks_are_refused(pack, name, architecture, said):
    errors = in_pack(pack, "deltaconv_core.errors").DeltaConvError
    with pytest.raises(errors, match=said):
        with_joint(pack, make_joint(name), make_blocks(pack, architecture=architecture))


def test_joint_mixers_take_their_place(pack, model):
    with_blocks = with_joint(pack, model, make_blocks(pack, joint_sites(pack, model).channels[SITE]))
    mixers = make_joint_mixers(pack, model, landmarks=2**14, kernel_size=0)
    again = with_joint(pack, with_blocks, mixers)
    assert largest_error(sample_joint(again, "sd35"), sample_joint(model, "sd35")) < 1e-5
