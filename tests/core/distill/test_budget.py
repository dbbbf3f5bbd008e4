"""Budgets decide which attentions are replaced, and say why."""

from __future__ import annotations

import itertools
import random

import pytest

from deltaconv_core import DeltaConvError
from deltaconv_core.distill.budget import Attention, Option, within_cost, within_error

SITES = {
    "large": Attention(100.0, [Option(0.5, 10.0), Option(0.2, 30.0), Option(0.1, 60.0)]),
    "small": Attention(10.0, [Option(0.3, 9.0), Option(0.05, 12.0)]),
    "tiny": Attention(1.0, [Option(0.01, 2.0)]),
}


def options(decisions):
    return {id: decision.option for id, decision in decisions.items()}


@pytest.mark.parametrize(
    ("error", "chosen"),
    [
        (0.6, {"large": 0, "small": 0, "tiny": None}),
        (0.2, {"large": 1, "small": None, "tiny": None}),
        (0.15, {"large": 2, "small": None, "tiny": None}),
        (0.01, {"large": None, "small": None, "tiny": None}),
    ],
)
def test_the_cheapest_within_an_error(error, chosen):
    assert options(within_error(SITES, error)) == chosen


def test_reasons_of_an_error_budget():
    decisions = within_error(SITES, 0.2)
    assert decisions["large"].reason == "error 0.2, 30% of attention's cost"
    assert decisions["small"].reason == "the best mixer has an error of 0.3, above 0.2"
    assert decisions["tiny"].reason == "attention is cheap here: the cheapest mixer costs 200% of it"


def test_a_cost_budget_is_met_at_the_least_error():
    """Every choice is tried; the greedy one is at most one step off the best."""
    random.seed(0)
    for _ in range(50):
        sites = {
            str(n): Attention(
                random.uniform(5, 20), [Option(random.random(), random.uniform(1, 20)) for _ in range(3)]
            )
            for n in range(4)
        }
        choices = [[None, *range(3)] for _ in sites]
        whole = sum(site.cost for site in sites.values())
        share = random.uniform(0.3, 1)

        def cost(choice, sites=sites):
            return sum(
                s.cost if c is None else s.options[c].cost
                for s, c in zip(sites.values(), choice, strict=True)
            )

        def error(choice, sites=sites):
            return sum(
                0 if c is None else s.options[c].error for s, c in zip(sites.values(), choice, strict=True)
            )

        found = tuple(options(within_cost(sites, share)).values())
        possible = [choice for choice in itertools.product(*choices) if cost(choice) <= share * whole]
        if not possible:
            assert cost(found) == min(map(cost, itertools.product(*choices)))
            continue
        assert cost(found) <= share * whole
        # No choice that costs as little has a smaller error: the greedy one is optimal for its own cost.
        assert error(found) <= min(error(c) for c in possible if cost(c) <= cost(found)) + 1e-9


def test_a_whole_budget_changes_nothing():
    decisions = within_cost(SITES, 1.0)
    assert set(options(decisions).values()) == {None}
    assert "met without it" in decisions["large"].reason
    assert "attention is cheap here" in decisions["tiny"].reason


@pytest.mark.parametrize("share", [0, 1.5])
def test_refuses_shares_out_of_range(share):
    with pytest.raises(DeltaConvError, match=f"got {share}"):
        within_cost(SITES, share)


def test_refuses_an_error_of_nothing():
    with pytest.raises(DeltaConvError, match="above 0, got 0"):
        within_error(SITES, 0)
