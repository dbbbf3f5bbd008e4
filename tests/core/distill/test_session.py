"""What both hosts draw, start and note alike."""

from __future__ import annotations

import pytest
import torch

from deltaconv_core import BlockSpec, DeltaConvBlock
from deltaconv_core.distill import session, warm_start
from deltaconv_core.distill.order import generator
from testing.tiny_network import make_network

SHAPE = (3, 4, 5, 6)


def test_the_draw_of_a_batch_is_that_of_every_run_so_far():
    """Written out; runs that were begun before have to see the same batches."""
    random = generator(7, "batch", 12)
    noise = torch.randn(SHAPE, generator=random)
    levels = torch.randint(1000, (3,), generator=random)
    dropped = torch.rand(3, generator=random) < 0.4
    drawn = session.draw(7, 12, SHAPE, 1000, 0.4)
    assert all(map(torch.equal, drawn, (noise, levels, dropped)))


def test_captions_are_dropped_picture_by_picture():
    dropped = torch.stack([session.draw(0, number, SHAPE, 10, 0.25)[2] for number in range(400)])
    assert 0.2 < dropped.float().mean() < 0.3
    assert set(dropped.sum(dim=1).tolist()) == {0, 1, 2, 3}


def test_captions_of_earlier_runs_of_the_node_are_dropped_batch_by_batch():
    """By the number that came after noise and levels; for one picture it is the same number either way."""
    for number in range(50):
        random = generator(3, "batch", number)
        torch.randn(SHAPE, generator=random), torch.randint(10, (3,), generator=random)
        dropped = bool(torch.rand((), generator=random) < 0.5)
        noise, levels, by_batch = session.draw(3, number, SHAPE, 10, 0.5, by_batch=True)
        assert by_batch.tolist() == [dropped] * 3
        one_by_one = session.draw(3, number, SHAPE, 10, 0.5)
        assert noise.equal(one_by_one[0]) and levels.equal(one_by_one[1])
        single = [session.draw(3, number, (1, *SHAPE[1:]), 10, 0.5, by_batch=on)[2] for on in (True, False)]
        assert single[0].equal(single[1])


def test_blocks_start_from_the_seed_and_from_their_attention():
    network, specs = make_network(), {}
    for site in network.attentions:
        specs[site] = BlockSpec(8, 3)
    before = torch.random.get_rng_state()
    blocks = session.start_blocks(specs, 5, torch.device("cpu"), network.attentions.__getitem__)
    assert torch.random.get_rng_state().equal(before)
    torch.manual_seed(5)
    expected = {site: DeltaConvBlock(spec) for site, spec in specs.items()}
    for site, block in expected.items():
        warm_start(block, network.attentions[site])
        assert all(w.equal(blocks[site].state_dict()[name]) for name, w in block.state_dict().items())


def test_notes_name_what_must_not_change():
    specs = {"a": BlockSpec(8, 3)}
    notes = session.notes("f00d", specs, 4, 0.15, data="cafe")
    assert list(notes) == ["teacher", "data", "batch_size", "caption_dropout", "blocks"]
    assert notes["batch_size"] == "4" and notes["caption_dropout"] == "0.15"
    assert '"kernel_size": 3' in notes["blocks"]
    told = session.metadata("SD", {"seed": 1}, "3 pictures", "made here", notes)
    assert told == {
        "teacher": "SD f00d", "training": '{"seed": 1}', "data": "3 pictures, cafe", "source": "made here",
    }  # fmt: skip


@pytest.mark.parametrize("parts", [["a", "b"], ["ab"]])
def test_fingerprints(parts):
    assert session.fingerprint(parts) == "fb8e20fc2e4c3f24"
    assert session.fingerprint(["b", "a"]) != "fb8e20fc2e4c3f24"
    assert session.first_values(torch.arange(20, dtype=torch.float16).view(4, 5)) == list(range(8))
