"""Fixtures of the tests with diffusers."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")

from testing.diffusers_models import KINDS, make, make_checkpoint


class Case:
    """A model, blocks for it, and what it was like before anything was done to it."""

    def __init__(self, kind):
        self.kind = kind
        self.model = make(kind)
        self.checkpoint = make_checkpoint(self.model)

    def fresh(self):
        """The same model once more."""
        return make(self.kind)


@pytest.fixture(params=KINDS)
def case(request):
    return Case(request.param)


@pytest.fixture
def sd():
    return Case("sd")


@pytest.fixture
def pixart():
    return Case("pixart")
