"""The loop where several train together; threads stand for the processes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from deltaconv_core.distill import Batch, RunFolder, Settings, distill
from deltaconv_core.errors import DeltaConvError
from testing.tiny_network import batches, make_mixers, make_network

SETTINGS = Settings(layer_steps=3, output_steps=3, learning_rate=1e-2, warmup=2, accumulation=2, ema=0.9)
COUNT = 2


class Meeting:
    """Where threads exchange what they have."""

    def __init__(self):
        self.barrier = threading.Barrier(COUNT)
        self.brought = [None] * COUNT

    def exchange(self, number, value):
        self.brought[number] = value
        self.barrier.wait(20)
        gathered = list(self.brought)
        self.barrier.wait(20)
        return gathered


class Threads:
    """`deltaconv_core.distill.Processes` for one of them."""

    def __init__(self, meeting, number):
        self.meeting = meeting
        self.number = number

    @torch.no_grad()
    def share(self, tensors):
        first = self.meeting.exchange(self.number, [tensor.clone() for tensor in tensors])[0]
        for tensor, value in zip(tensors, first, strict=True):
            tensor.copy_(value)

    @torch.no_grad()
    def mean(self, tensors):
        gathered = self.meeting.exchange(self.number, [tensor.clone() for tensor in tensors])
        for place, tensor in enumerate(tensors):
            tensor.copy_(torch.stack([one[place] for one in gathered]).mean(dim=0))

    def check_same(self, value):
        if len(set(self.meeting.exchange(self.number, value))) > 1:
            raise DeltaConvError("not the same")


def half(number):
    """One sample of each batch of two."""

    def part(n):
        batch = batches(n)
        chosen = slice(number, number + 1)
        return Batch(batch.noisy[chosen], batch.target[chosen], batch.snr[chosen])

    return part


def run_together(settings=SETTINGS, folders=(None, None), data=half, seeds=(1, 2)):
    """(weights, result) of each."""
    meeting = Meeting()
    # One after the other: threads share the generator that these draw from.
    networks = [make_network() for _ in range(COUNT)]
    all_mixers = [make_mixers(network, seed) for network, seed in zip(networks, seeds, strict=True)]

    def work(number):
        network, mixers = networks[number], all_mixers[number]
        chosen = settings[number] if isinstance(settings, tuple) else settings
        result = distill(
            network, mixers, data(number), chosen, folders[number], processes=Threads(meeting, number)
        )
        return weights(mixers), result

    with ThreadPoolExecutor(COUNT) as pool:
        return [future.result() for future in [pool.submit(work, number) for number in range(COUNT)]]


def weights(mixers):
    return {f"{site}.{name}": p for site, mixer in mixers.items() for name, p in mixer.state_dict().items()}


def test_halves_of_batches_train_what_whole_ones_do():
    """And both start from the first one's blocks, whatever their own were."""
    network = make_network()
    mixers = make_mixers(network)
    alone = distill(network, mixers, batches, SETTINGS)
    (first, result), (second, _) = run_together()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name, weight in weights(mixers).items():
        torch.testing.assert_close(first[name], weight, rtol=0, atol=1e-5)
    for row, expected in zip(result.rows, alone.rows, strict=True):
        assert row.losses == pytest.approx(expected.losses, rel=1e-4)
        assert row.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-4)


def test_only_the_first_writes_and_all_go_on(tmp_path):
    folders = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run", writes=False)
    whole = run_together()[0][0]
    run_together(replace(SETTINGS, output_steps=1, decay=0.0), folders)
    assert folders[0].exists and len(folders[0].read_log()) == 4
    run_together(replace(SETTINGS, decay=0.0), folders)
    resumed, expected = (
        run_together(replace(SETTINGS, decay=0.0), folders),
        run_together(replace(SETTINGS, decay=0.0)),
    )
    assert all(torch.equal(resumed[1][0][name], expected[0][0][name]) for name in whole)
    assert len(folders[0].read_log()) == 6
    unseen = RunFolder(tmp_path / "elsewhere", writes=False)
    unseen.save(None, [])
    assert not unseen.path.exists()


def test_a_bad_number_in_one_stops_all():
    def data(number):
        def part(n):
            batch = half(number)(n)
            return replace(batch, target=batch.target * torch.nan) if (number, n) == (1, 8) else batch

        return part

    (first, result), (second, other) = run_together(data=data)
    assert result.step == other.step == 4 and "step 5" in result.stopped and "step 5" in other.stopped
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_those_that_do_not_train_the_same():
    with pytest.raises(DeltaConvError, match="not the same"):
        run_together((SETTINGS, replace(SETTINGS, learning_rate=1e-3)))
