"""Fetching with huggingface_hub itself, sent by HF_ENDPOINT to a stand-in for the Hub on loopback."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from deltaconv_core import FetchError
from deltaconv_core.weights.manifest import HubSource, Record
from testing.fault_server import Content, Fault, HubServer, serving
from testing.weight_records import SPAWN, fetch, leftovers, record, sha256, weights

CHUNK = 10 << 20  # huggingface_hub hands on so many bytes at once
BODY = weights(CHUNK + 1_000_003)
OTHER = weights(CHUNK + 1_000_003, seed=1)
NAME = "weights.safetensors"
TOKEN = "hf_aTokenThatNobodyElseMaySee"
KNOWN = record(HubSource("owner/name", NAME, HubServer.COMMIT), BODY)
UNKNOWN = record(HubSource("owner/name", NAME))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubServer, ProcessPoolExecutor]]:
    """The stand-in, and a process whose huggingface_hub was imported with HF_ENDPOINT set."""
    with pytest.MonkeyPatch.context() as patch, serving(HubServer()) as server:
        patch.setenv("HF_ENDPOINT", server.url)
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        patch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
        with ProcessPoolExecutor(1, SPAWN) as pool:
            yield server, pool


@pytest.fixture
def hub(running: tuple[HubServer, ProcessPoolExecutor]) -> HubServer:
    server = running[0]
    server.forget()
    server.add("owner/name", NAME, Content(BODY))
    server.states_hash, server.head_status, server.head_page = True, None, False
    return server


@pytest.fixture
def get(running: tuple[HubServer, ProcessPoolExecutor], tmp_path: Path):
    """Fetch in the process that has HF_ENDPOINT set, into tmp_path."""
    return lambda wanted: running[1].submit(fetch, wanted, tmp_path).result(60)


@pytest.mark.parametrize("wanted", [KNOWN, UNKNOWN], ids=["known", "unknown"])
def test_a_file_arrives_whole(hub: HubServer, get, tmp_path: Path, wanted: Record) -> None:
    path = get(wanted)
    assert path.read_bytes() == BODY
    assert leftovers(tmp_path) == {NAME} | ({f"{NAME}.sha256"} if wanted is UNKNOWN else set())
    count = len(hub.seen)
    assert get(wanted) == path and len(hub.seen) == count
    revision = HubServer.COMMIT if wanted is KNOWN else "main"
    assert f"/owner/name/resolve/{revision}/{NAME}" in [request.path for request in hub.seen]


def test_the_token_goes_to_the_hub_and_nowhere_else(hub: HubServer, get) -> None:
    get(KNOWN)
    for request in hub.seen:
        assert (TOKEN in request.headers.get("authorization", "")) is ("/resolve/" in request.path), request
    assert any("/resolve/" not in request.path for request in hub.seen)


def test_a_mirror_that_states_no_hash_will_do(hub: HubServer, get, tmp_path: Path) -> None:
    hub.states_hash = False
    assert get(UNKNOWN).read_bytes() == BODY
    assert (tmp_path / f"{NAME}.sha256").read_text().startswith(sha256(BODY))


@pytest.mark.parametrize("at", [0, 100, CHUNK, CHUNK + 100, len(BODY) - 1])
def test_a_cut_is_got_over_now_or_by_the_next_fetch(hub: HubServer, get, tmp_path: Path, at: int) -> None:
    hub.faults = [Fault(cut=at)]
    with suppress(FetchError):  # older versions of the library do not try again after a cut
        get(KNOWN)
    assert get(KNOWN).read_bytes() == BODY
    assert hub.sent <= len(BODY) + at % CHUNK  # a piece that is not complete is lost


def test_a_server_that_always_cuts_is_given_up(hub: HubServer, get, tmp_path: Path) -> None:
    hub.faults = [Fault(cut=1000, ignore_range=True)] * 99
    with pytest.raises(FetchError, match="by hand") as caught:
        get(KNOWN)
    for word in ("owner/name", str(tmp_path), NAME, str(len(BODY)), sha256(BODY)):
        assert word in str(caught.value)
    hub.forget()
    assert not (tmp_path / NAME).exists()
    assert get(KNOWN).read_bytes() == BODY


@pytest.mark.parametrize("wanted", [KNOWN, UNKNOWN], ids=["known", "unknown"])
@pytest.mark.parametrize(
    "fault", [Fault(flip=len(BODY) - 1), Fault(plain_page=True), Fault(extra_length=-1000)]
)
def test_wrong_bytes_never_get_the_name(
    hub: HubServer, get, tmp_path: Path, wanted: Record, fault: Fault
) -> None:
    hub.faults = [fault]
    with pytest.raises(FetchError):
        get(wanted)
    assert not (tmp_path / NAME).exists()
    assert get(wanted).read_bytes() == BODY


def test_a_range_that_is_ignored_does_no_harm(hub: HubServer, get, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(BODY[:CHUNK])
    (tmp_path / f"{NAME}.part.id").write_text(sha256(BODY))
    hub.faults = [Fault(ignore_range=True)]
    with suppress(FetchError):  # older versions of the library append the whole file
        get(KNOWN)
    assert get(KNOWN).read_bytes() == BODY


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500])
def test_an_answer_that_is_no_file_is_told(hub: HubServer, get, tmp_path: Path, status: int) -> None:
    hub.head_status = status
    with pytest.raises(FetchError, match=str(status)):
        get(KNOWN)
    assert leftovers(tmp_path) == set()
    hub.head_status = None
    assert get(KNOWN).read_bytes() == BODY


def test_a_page_in_place_of_the_hub_is_told(hub: HubServer, get, tmp_path: Path) -> None:
    hub.head_page = True
    with pytest.raises(FetchError, match="HF_ENDPOINT"):
        get(KNOWN)
    assert leftovers(tmp_path) == set()


def test_a_part_of_another_version_is_not_gone_on_with(hub: HubServer, get, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(OTHER[:CHUNK])
    (tmp_path / f"{NAME}.part.id").write_text(sha256(OTHER))
    assert get(UNKNOWN).read_bytes() == BODY


@pytest.mark.parametrize("pinned", [False, True])
def test_a_hub_that_offers_another_file_is_refused(hub: HubServer, get, tmp_path: Path, pinned: bool) -> None:
    hub.add("owner/name", NAME, Content(OTHER))
    if pinned:
        (tmp_path / f"{NAME}.sha256").write_text(f"{sha256(BODY)}  {NAME}\n")
    with pytest.raises(FetchError, match=f"{sha256(OTHER)}.*{sha256(BODY)}.*not fetched"):
        get(UNKNOWN if pinned else KNOWN)
    assert hub.gets() == []


def test_killed_in_the_middle_it_goes_on(
    hub: HubServer, get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "60")
    hub.faults = [Fault(stall=CHUNK)]
    process = SPAWN.Process(target=fetch, args=(UNKNOWN, tmp_path))
    process.start()
    part = tmp_path / f"{NAME}.part"
    while not (part.exists() and part.stat().st_size >= CHUNK):
        assert process.is_alive()
        time.sleep(0.02)
    process.kill()
    process.join()
    assert not (tmp_path / NAME).exists()
    hub.forget()
    assert get(UNKNOWN).read_bytes() == BODY
    assert 0 < hub.sent <= len(BODY) - CHUNK
