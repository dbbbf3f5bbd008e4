"""Prototype queries: what they are equal to, and that the fit finds the best mix."""

import pytest
import torch
from torch.nn import functional as F

from demo.files import teacher_file
from demo.study import prototypes
from demo.study.prototypes import Prototypes, errors, gather, means_of, solve
from demo.study.train_student import Teacher

GRID = (6, 6)


@pytest.fixture(scope="module")
def teacher():
    return Teacher(teacher_file())


def test_with_the_queries_themselves_and_a_hard_choice_it_is_attention():
    q, k, v = torch.randn(3, 1, 2, 36, 8, generator=torch.manual_seed(0)).unbind(0)
    q = 40 * F.normalize(q, dim=3)  # so that each is nearest to itself by far
    torch.testing.assert_close(Prototypes(q[0])(q, k, v, GRID), F.scaled_dot_product_attention(q, k, v))


def test_each_is_the_mean_of_the_points_that_are_nearest_to_it():
    centres = torch.tensor([[[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]])
    points = centres.repeat_interleave(50, 1) + 0.1 * torch.randn(1, 150, 2, generator=torch.manual_seed(1))
    found = means_of(points, 3, torch.Generator().manual_seed(3))
    nearest = torch.cdist(points, found)[0].argmin(1)
    for number, mean in enumerate(found[0]):
        torch.testing.assert_close(points[0, nearest == number].mean(0), mean)


def test_the_fit_is_better_than_the_start_on_drawings_it_has_not_seen(teacher, monkeypatch):
    monkeypatch.setattr(prototypes, "FIT_BATCH", 2)
    points = gather(teacher, range(2))
    sites = {
        site: Prototypes(means_of(own, 4, torch.Generator().manual_seed(0))) for site, own in points.items()
    }
    before = errors(teacher, sites, range(2, 3))
    solve(teacher, sites, range(2))
    after = errors(teacher, sites, range(2, 3))
    assert before.keys() == teacher.sites.keys()
    assert sum(after.values()) < 0.8 * sum(before.values())


def test_the_solution_is_that_of_all_features_at_once(teacher, monkeypatch):
    monkeypatch.setattr(prototypes, "FIT_BATCH", 1)
    monkeypatch.setattr(prototypes, "RIDGE", 1e-6)
    calls = {}
    prototypes.passing(teacher, lambda site, *call: calls.setdefault(site, call[:3]), range(1))
    site = next(iter(calls))
    q, k, v = calls[site]
    mixer = Prototypes(q[0, :, :3].clone())
    solve(
        teacher,
        {site: mixer}
        | {other: Prototypes(c[0][0, :, :3].clone()) for other, c in calls.items() if other != site},
        range(1),
    )
    products = torch.einsum("hnf,hmd->hndmf", mixer.features(q)[0], mixer.answers(k, v)[0]).double()
    wanted = F.scaled_dot_product_attention(q, k, v)[0].double()
    for head, matrix in enumerate(products.flatten(3).flatten(1, 2)):
        best = torch.linalg.lstsq(matrix, wanted[head].flatten()[:, None]).solution
        least = (matrix @ best - wanted[head].flatten()[:, None]).square().sum()
        own = (
            (matrix @ mixer.mix[head].double().flatten()[:, None] - wanted[head].flatten()[:, None])
            .square()
            .sum()
        )
        assert own <= 1.02 * least + 1e-6 * wanted[head].square().sum()
