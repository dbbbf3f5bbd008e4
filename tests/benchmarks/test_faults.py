"""Each fault without a server, once; and that the command sees what is not as it should be."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from benchmarks import faults

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills and disks as Linux has them")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv(faults.ALLOW_LOOPBACK, "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture
def disks(tmp_path):
    """Small disks of one's own, which need root, and more rights than some containers give it."""
    try:
        with faults.small_disk(tmp_path / "try"):
            pass
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disk can be mounted: {error}")


@pytest.mark.parametrize("fault", [faults.saving, faults.distilling])
def test_a_kill_leaves_nothing_partial(tmp_path, fault):
    fault(random.Random(0), tmp_path)


def test_a_killed_fetch_goes_on(tmp_path):
    faults.fetching(random.Random(0), tmp_path)


@pytest.mark.parametrize("fault", [faults.full_disk, faults.full_while_fetching, faults.read_only])
def test_a_disk_that_cannot_be_written_changes_nothing(disks, tmp_path, fault):
    fault(random.Random(0), tmp_path)


def test_a_read_only_disk_that_can_be_written_is_told(disks, tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "unwritable", faults.nullcontext)
    with pytest.raises(faults.Unexpected, match="was not refused"):
        faults.read_only(random.Random(0), tmp_path)
