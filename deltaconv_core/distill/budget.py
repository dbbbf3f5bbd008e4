"""Which attentions are worth replacing, and by which of the mixers that were fitted to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import DeltaConvError


@dataclass(frozen=True)
class Option:
    """One mixer that could stand in for an attention.

    Args:
        error: relative error of what it answers, measured on held-out pictures.
        cost: of one call, in any unit that all options and attentions share.
    """

    error: float
    cost: float


@dataclass(frozen=True)
class Attention:
    """One attention.

    Args:
        cost: of one call of it.
        options: mixers that could stand in.
    """

    cost: float
    options: Sequence[Option]


@dataclass(frozen=True)
class Decision:
    """What stands at a site.

    Args:
        option: number of the mixer; None: the attention stays.
        reason: why, for people.
    """

    option: int | None
    reason: str


def within_error(sites: Mapping[str, Attention], error: float) -> dict[str, Decision]:
    """At each site the cheapest mixer whose error is small enough, if it is cheaper than the attention.

    Args:
        sites: by id.
        error: the largest relative error that a mixer may have.

    Raises:
        DeltaConvError: an error that is not positive.
    """
    if not error > 0:
        raise DeltaConvError(f"expected an error budget above 0, got {error}")
    found = {}
    for id, site in sites.items():
        cheaper = [n for n, option in enumerate(site.options) if option.cost < site.cost]
        good = [n for n in cheaper if site.options[n].error <= error]
        if good:
            best = min(good, key=lambda n: (site.options[n].cost, site.options[n].error))
            found[id] = Decision(best, _chosen(site, best))
        elif cheaper:
            least = min(site.options[n].error for n in cheaper)
            found[id] = Decision(None, f"the best mixer has an error of {least:.3g}, above {error:g}")
        else:
            found[id] = Decision(None, _dear(site))
    return found


def within_cost(sites: Mapping[str, Attention], share: float) -> dict[str, Decision]:
    """Mixers that bring the cost of all sites down to a share of what their attentions cost, at small errors.

    Starting from attention everywhere, one site after the other takes the mixer that saves most for each unit
    of error that it adds (the greedy solution of the knapsack problem, on each site's lower convex hull),
    until the budget is met.

    Args:
        sites: by id.
        share: of the attentions' cost, 0 to 1.

    Raises:
        DeltaConvError: a share out of range.
    """
    if not 0 < share <= 1:
        raise DeltaConvError(f"expected a time budget above 0 and at most 1 of attention's time, got {share}")
    goal = share * sum(site.cost for site in sites.values())
    steps: list[tuple[float, int, str, int, float]] = []
    for id, site in sites.items():
        before = Option(0.0, site.cost)
        for number in _hull(site):
            after = site.options[number]
            saved = before.cost - after.cost
            steps.append(((after.error - before.error) / saved, len(steps), id, number, saved))
            before = after
    taken: dict[str, int] = {}
    cost = sum(site.cost for site in sites.values())
    for _, _, id, number, saved in sorted(steps):
        if cost <= goal:
            break
        taken[id] = number
        cost -= saved
    found = {}
    for id, site in sites.items():
        if id in taken:
            found[id] = Decision(taken[id], _chosen(site, taken[id]))
        elif not _hull(site):
            found[id] = Decision(None, _dear(site))
        else:
            found[id] = Decision(None, "the time budget is met without it, and others add less error")
    return found


def _hull(site: Attention) -> list[int]:
    """Options from attention (no error) to the cheapest one, such that each step saves less for its error."""
    hull: list[int] = []
    for number in sorted(
        range(len(site.options)), key=lambda n: (site.options[n].error, site.options[n].cost)
    ):
        if site.options[number].cost >= (site.options[hull[-1]].cost if hull else site.cost):
            continue
        while hull:
            first = site.options[hull[-2]] if len(hull) > 1 else Option(0.0, site.cost)
            middle, last = site.options[hull[-1]], site.options[number]
            # Whether the middle one lies on or above the line from the first to the last.
            if (middle.error - first.error) * (first.cost - last.cost) < (last.error - first.error) * (
                first.cost - middle.cost
            ):
                break
            hull.pop()
        hull.append(number)
    return hull


def _chosen(site: Attention, number: int) -> str:
    option = site.options[number]
    return f"error {option.error:.3g}, {option.cost / site.cost:.0%} of attention's cost"


def _dear(site: Attention) -> str:
    if not site.options:
        return "no mixer was fitted"
    least = min(option.cost for option in site.options)
    return f"attention is cheap here: the cheapest mixer costs {least / site.cost:.0%} of it"
