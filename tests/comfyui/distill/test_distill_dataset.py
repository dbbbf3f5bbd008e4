"""What ΔConv Distill learns from: latents and captions in every form that nodes hand over."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from testing.comfy_distill import distil, latents, single_items
from testing.comfy_models import (
    conditioning,
    in_pack,
)

pytestmark = pytest.mark.usefixtures("output")


def one_batch():
    return latents((4, 4, 16, 16)), [conditioning(1)], 4


def buckets():
    """As Resolution Bucket gives them: a batch per size, and as many conditions in each list."""
    positive = [conditioning(0) + conditioning(1), conditioning(2) + conditioning(3) + conditioning(4)]
    return latents((2, 4, 16, 16), (3, 4, 8, 24)), positive, 5


def mixed_sizes():
    return latents((1, 4, 17, 23), (1, 4, 16, 16), (2, 4, 17, 23)), [conditioning(i) for i in range(4)], 4


@pytest.mark.parametrize("form", [one_batch, single_items, buckets, mixed_sizes])
def test_forms_of_data(pack, unet, form):
    data, positive, count = form()
    output = distil(pack, unet, data, positive, batch_size=2)
    assert f"learn from {count} latents" in output.ui.as_dict()["text"][0]


@pytest.mark.parametrize(
    ("shapes", "value", "warning"),
    [
        ([(1, 4, 16, 16)], 0.0, "the latents are empty, so the blocks learn from noise alone"),
        ([(2, 4, 16, 16)], 0.5, "all latents are the same picture"),
        ([(1, 4, 16, 16)], 0.5, None),
        ([(1, 4, 16, 16), (1, 4, 8, 24)], 0.5, None),
    ],
)
def test_warns_of_latents_that_teach_nothing(pack, unet, shapes, value, warning):
    data = [{"samples": torch.full(shape, value)} for shape in shapes]
    text = distil(pack, unet, data, [conditioning(0)], batch_size=1).ui.as_dict()["text"][0]
    if warning:
        assert text.splitlines()[1].startswith(f"Warning: {warning}")
    else:
        assert "Warning" not in text


def test_sdxl_with_its_pooled_text_and_sizes(pack):
    """Of which a batch has one for each picture."""
    import comfy.supported_models

    from testing.comfy_models import make_model, unet_config

    class TinySDXL(comfy.supported_models.SDXL):
        memory_usage_factor = 1.0
        unet_extra_config: ClassVar = {}

    config = unet_config(num_classes="sequential", adm_in_channels=1280 + 6 * 256)
    model = make_model(TinySDXL(config), torch.float32, None)
    data, positive, _ = mixed_sizes()
    for number, [(_, options)] in enumerate(positive):
        options["pooled_output"] = torch.full((1, 1280), float(number))
    seen = []
    adm = model.model.diffusion_model.label_emb[0][0]
    adm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    distil(pack, model, data, positive, batch_size=2, negative=[positive[0]])
    assert {len(y) for y in seen} >= {2}
    heights = {tuple(y[0, 1280:].tolist()) for y in seen}
    assert len(heights) == 2
    model.detach()


def test_every_sample_is_seen_once_a_pass(pack, unet, output):
    """In another order each time; batches have one size, and texts whose lengths fit each other."""
    network = FakeNetwork()
    module = in_pack(pack, "nodes.host.distill.dataset")
    shapes = [(1, 4, 8, 8)] * 5 + [(1, 4, 8, 12)] * 2
    samples = [module.Sample(torch.full(shape, float(i)), {}) for i, shape in enumerate(shapes)]
    batches = module.Batches(network, module.Dataset(samples), 2, seed=3, dropout=0.0)
    assert batches.order.per_epoch == 4
    passes = [[batches(n)[0][:, 0, 0, 0].tolist() for n in range(4 * e, 4 * e + 4)] for e in range(3)]
    for batch in passes:
        seen = [value for values in batch for value in values]
        assert set(seen) == set(range(7)) and len(seen) == 8
    assert passes[0] != passes[1]
    again = module.Batches(network, module.Dataset(samples), 2, seed=3, dropout=0.0)
    assert again(9)[0].equal(batches(9)[0]) and again(9)[1].equal(batches(9)[1])
    assert not batches(8)[1].equal(batches(9)[1])
    other = module.Batches(network, module.Dataset(samples), 2, seed=4, dropout=0.0)
    assert not other(9)[1].equal(batches(9)[1])


class FakeNetwork:
    """Gives back what it is asked to make a batch of."""

    device = torch.device("cpu")
    sigmas = torch.arange(1.0, 11.0)

    def encode(self, condition, latent):
        return dict(condition)

    def fit(self, first, second):
        return True

    def join(self, encoded):
        return encoded

    def batch(self, *parts):
        return parts


def test_dropped_captions(pack, unet):
    module = in_pack(pack, "nodes.host.distill.dataset")
    samples = [module.Sample(torch.zeros(1, 4, 8, 8), {"text": "a"})]
    dataset = module.Dataset(samples, {"text": ""})
    batches = module.Batches(FakeNetwork(), dataset, 1, seed=0, dropout=0.25)
    dropped = [batches(n)[3][0]["text"] == "" for n in range(400)]
    assert 70 < sum(dropped) < 130
    without = module.Batches(FakeNetwork(), module.Dataset(samples), 1, seed=0, dropout=0.25)
    assert all(without(n)[3][0]["text"] == "a" for n in range(50))


def test_captions_that_do_not_fit_the_empty_one_are_dropped_by_batch(pack, unet):
    module = in_pack(pack, "nodes.host.distill.dataset")

    class OfOneLength(FakeNetwork):
        def fit(self, first, second):
            return len(first["text"]) == len(second["text"])

    samples = [module.Sample(torch.zeros(1, 4, 8, 8), {"text": text}) for text in ("a", "b", "c", "d")]
    batches = module.Batches(OfOneLength(), module.Dataset(samples, {"text": ""}), 4, seed=0, dropout=0.25)
    texts = [{one["text"] for one in batches(number)[3]} for number in range(400)]
    assert all(seen in ({""}, {"a", "b", "c", "d"}) for seen in texts)
    assert 70 < texts.count({""}) < 130


def timed(start, end):
    return [[torch.zeros(1, 5, 16), {"start_percent": start, "end_percent": end}]]


def test_the_whole_range_of_timesteps_is_no_range(pack, unet):
    distil(pack, unet, latents((1, 4, 8, 8)), [timed(0.0, 1.0)])


@pytest.mark.parametrize(
    ("data", "positive", "negative", "message"),
    [
        (latents((3, 4, 8, 8)), [conditioning(0), conditioning(1)], None, "holds 3 pictures.* 2 conditions"),
        (latents((2, 3, 8, 8)), [conditioning(0)], None, r"\(B, 4, H, W\).*\(2, 3, 8, 8\)"),
        ([], [conditioning(0)], None, "no latents"),
        (latents((1, 4, 8, 8)), [conditioning(0)], [conditioning(0) * 2], "negative holds 2 conditions"),
        ([{"samples": torch.full((1, 4, 8, 8), torch.nan)}], [conditioning(0)], None, "NaN"),
        (latents((1, 4, 8, 8)), [[[torch.zeros(1, 5, 16), {"area": (8, 8, 0, 0)}]]], None, "with area"),
        (latents((1, 4, 8, 8)), [timed(0.2, 1.0)], None, "with start_percent"),
        (latents((1, 4, 8, 8)), [[[torch.zeros(2, 5, 16), {}]]], None, "batch of 2 texts"),
    ],
)
def test_bad_data(pack, unet, output, data, positive, negative, message):
    with pytest.raises(ValueError, match=message):
        distil(pack, unet, data, positive, negative=negative)
    assert not output.exists()
