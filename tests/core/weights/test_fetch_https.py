"""Fetching over real connections that fail: a clear error, no bad file, and the retry completes."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deltaconv_core import FetchError
from deltaconv_core.weights.fetch import https, resolve
from deltaconv_core.weights.fetch.address import ALLOW_LOOPBACK
from deltaconv_core.weights.manifest import Record, UrlSource
from testing.fault_server import Content, Fault, FaultServer, serving
from testing.weight_records import SPAWN, fetch, leftovers, record, sha256, weights

BODY = weights(300_001)
OTHER = weights(300_001, seed=1)
NAME = "weights.safetensors"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    monkeypatch.setenv(ALLOW_LOOPBACK, "1")
    monkeypatch.setattr(https, "PAUSE", 0.0)
    with serving(FaultServer()) as server:
        server.files[f"/{NAME}"] = Content(BODY)
        yield server


@pytest.fixture
def one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(https, "ATTEMPTS", 1)


def known(server: FaultServer) -> Record:
    return record(UrlSource(f"{server.url}/{NAME}"), BODY)


def unknown(server: FaultServer) -> Record:
    return record(UrlSource(f"{server.url}/{NAME}"))


def part(folder: Path) -> Path:
    return folder / f"{NAME}.part"


@pytest.mark.parametrize("make", [known, unknown])
def test_a_file_arrives_whole_with_progress(server: FaultServer, tmp_path: Path, make) -> None:
    told: list[tuple[int, int | None]] = []
    path = resolve(make(server), tmp_path / "new" / "folder", progress=lambda *p: told.append(p))
    assert path.read_bytes() == BODY
    assert told[-1] == (len(BODY), len(BODY)) and told == sorted(told, key=lambda t: t[0])
    assert leftovers(path.parent) == {NAME} | ({f"{NAME}.sha256"} if make is unknown else set())


@pytest.mark.usefixtures("one_attempt")
@pytest.mark.parametrize("make", [known, unknown])
@pytest.mark.parametrize("at", [0, 1, 7, 65_535, 65_536, 131_072, 200_000, len(BODY) - 1])
def test_a_cut_keeps_the_part_and_the_next_fetch_goes_on(
    server: FaultServer, tmp_path: Path, at: int, make
) -> None:
    server.faults = [Fault(cut=at)]
    with pytest.raises(FetchError) as caught:
        resolve(make(server), tmp_path)
    for word in (
        "weights",
        server.url,
        str(tmp_path),
        NAME,
        *([str(len(BODY)), sha256(BODY)] if make is known else []),
    ):
        assert word in str(caught.value)
    kept = part(tmp_path).stat().st_size if part(tmp_path).exists() else 0
    assert at - https.CHUNK < kept <= at and not (tmp_path / NAME).exists()
    server.forget()
    assert resolve(make(server), tmp_path).read_bytes() == BODY
    assert server.sent == len(BODY) - kept


def test_cuts_are_got_over_without_being_asked(server: FaultServer, tmp_path: Path) -> None:
    server.faults = [
        Fault(cut=70_000),
        Fault(cut=0),
        Fault(status=503),
        Fault(status=429),
        Fault(cut=140_000),
    ]
    assert resolve(known(server), tmp_path).read_bytes() == BODY
    assert len(server.gets()) == 6


def test_a_server_that_always_fails_is_given_up(server: FaultServer, tmp_path: Path) -> None:
    server.faults = [Fault(cut=0)] * 99
    with pytest.raises(FetchError, match="connection"):
        resolve(known(server), tmp_path)
    assert len(server.gets()) == https.ATTEMPTS


@pytest.mark.parametrize("make", [known, unknown])
def test_a_server_that_ignores_ranges_starts_again(server: FaultServer, tmp_path: Path, make) -> None:
    server.faults = [Fault(cut=150_000), Fault(ignore_range=True)]
    assert resolve(make(server), tmp_path).read_bytes() == BODY
    assert server.gets()[1].sent == len(BODY)


BAD_BYTES = {
    "first": Fault(flip=0),
    "middle": Fault(flip=150_000),
    "last": Fault(flip=len(BODY) - 1),
    "page called a file": Fault(plain_page=True),
    "shorter": Fault(extra_length=-1000),
    "longer": Fault(extra_length=1000),
}


@pytest.mark.usefixtures("one_attempt")
@pytest.mark.parametrize("fault", BAD_BYTES.values(), ids=BAD_BYTES)
def test_wrong_bytes_never_get_the_name(server: FaultServer, tmp_path: Path, fault: Fault) -> None:
    server.faults = [fault]
    with pytest.raises(FetchError):
        resolve(known(server), tmp_path)
    assert not (tmp_path / NAME).exists()
    assert resolve(known(server), tmp_path).read_bytes() == BODY


@pytest.mark.usefixtures("one_attempt")
@pytest.mark.parametrize(
    "fault",
    [Fault(flip=3), Fault(flip=9), Fault(plain_page=True), Fault(extra_length=-1000)],
    ids=["header size", "header", "page", "shorter"],
)
def test_without_a_hash_the_header_must_fit_the_file(
    server: FaultServer, tmp_path: Path, fault: Fault
) -> None:
    server.faults = [fault]
    with pytest.raises(FetchError, match="not a whole safetensors file"):
        resolve(unknown(server), tmp_path)
    assert leftovers(tmp_path) == set()
    assert resolve(unknown(server), tmp_path).read_bytes() == BODY


@pytest.mark.usefixtures("one_attempt")
@pytest.mark.parametrize(
    ("fault", "said"),
    [(Fault(status=code), str(code)) for code in (401, 403, 404, 410, 429, 500, 503)]
    + [(Fault(page=True), "web page"), (Fault(no_length=True), "how long"), (Fault(encoding="gzip"), "gzip")],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("had", [0, 131_072])
def test_an_answer_that_is_no_file_is_told(
    server: FaultServer, tmp_path: Path, fault: Fault, said: str, had: int
) -> None:
    if had:
        server.faults = [Fault(cut=had)]
        with pytest.raises(FetchError):
            resolve(known(server), tmp_path)
    server.faults = [Fault(**{**vars(fault), "ignore_range": True})]
    with pytest.raises(FetchError, match=said):
        resolve(known(server), tmp_path)
    assert not (tmp_path / NAME).exists()
    if fault.status or fault.page:
        assert (part(tmp_path).stat().st_size if had else 0) == had
    assert resolve(known(server), tmp_path).read_bytes() == BODY


def test_redirects_are_followed_and_checked_hop_by_hop(server: FaultServer, tmp_path: Path) -> None:
    server.faults = [Fault(redirect=f"{server.url}/{NAME}?signed=1")]
    assert resolve(known(server), tmp_path).read_bytes() == BODY


@pytest.mark.parametrize(
    "target",
    ["http://192.0.2.1/w.safetensors", "https://10.0.0.1/w", "file:///etc/hostname", "ftp://example.com/w"],
)
def test_a_redirect_to_a_refused_address_is_refused(server: FaultServer, tmp_path: Path, target: str) -> None:
    server.faults = [Fault(redirect=target)] * 9
    with pytest.raises(FetchError, match="refused|No connection adapters"):
        resolve(known(server), tmp_path)
    assert leftovers(tmp_path) == set() and len(server.gets()) == 1


@pytest.mark.parametrize(
    "target",
    [
        "https://a:99999/w",
        "https://[::1/w",
        "https://a b/w",
        "https:///w",
        "//[",
        "https://\xff/w",
        "\x7f",
        "a" * 9000,
    ],
)
def test_a_redirect_to_what_is_no_address(
    server: FaultServer, tmp_path: Path, one_attempt: None, target: str
) -> None:
    server.faults = [Fault(redirect=target)]
    with pytest.raises(FetchError):
        resolve(known(server), tmp_path)
    assert leftovers(tmp_path) == set()


@pytest.mark.parametrize("length", ["9" * 5000, "\u0663", "1e9", "-1", "0x10", "1_0"])
@pytest.mark.parametrize("header", ["Content-Length", "Content-Range"])
def test_lengths_that_are_none(
    server: FaultServer, tmp_path: Path, one_attempt: None, header: str, length: str
) -> None:
    value = length if header == "Content-Length" else f"bytes 0-1/{length}"
    server.faults = [Fault(no_length=True, header=(header, value))]
    with pytest.raises(FetchError):
        resolve(known(server), tmp_path)
    assert not (tmp_path / NAME).exists()


def test_a_ring_of_redirects_ends(server: FaultServer, tmp_path: Path) -> None:
    server.faults = [Fault(redirect=f"{server.url}/{NAME}")] * 99
    with pytest.raises(FetchError, match="redirects"):
        resolve(known(server), tmp_path)


def test_a_stalled_fetch_stops_at_once_when_told(server: FaultServer, tmp_path: Path) -> None:
    server.faults = [Fault(stall=131_072)]

    def stalled() -> bool:
        return part(tmp_path).exists() and part(tmp_path).stat().st_size == 131_072

    start = time.monotonic()
    with pytest.raises(FetchError, match="stopped by the user"):
        resolve(known(server), tmp_path, cancelled=stalled)
    assert time.monotonic() - start < 30  # a stall lasts a minute
    assert stalled()
    assert resolve(known(server), tmp_path).read_bytes() == BODY
    assert server.gets()[1].sent == len(BODY) - 131_072


def test_a_callback_may_raise_what_it_likes(server: FaultServer, tmp_path: Path) -> None:
    class Interrupted(BaseException):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    server.faults = [Fault(stall=0), Fault(stall=0)]
    for callback in ("cancelled", "progress"):
        with pytest.raises(Interrupted):
            resolve(known(server), tmp_path, **{callback: interrupt})
    assert leftovers(tmp_path) == set()


def test_a_stall_ends_by_itself(server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(https, "TIMEOUT", (10.0, 1.0))
    server.faults = [Fault(stall=65_536)]
    assert resolve(known(server), tmp_path).read_bytes() == BODY
    monkeypatch.setattr(https, "ATTEMPTS", 1)
    server.faults = [Fault(stall=0)]
    with pytest.raises(FetchError, match="(?i)timed out"):
        resolve(record(UrlSource(f"{server.url}/{NAME}"), name="second"), tmp_path)


@pytest.mark.usefixtures("one_attempt")
@pytest.mark.parametrize("ignore_if_range", [False, True])
def test_a_part_of_another_version_is_not_gone_on_with(
    server: FaultServer, tmp_path: Path, ignore_if_range: bool
) -> None:
    server.faults = [Fault(cut=150_000)]
    with pytest.raises(FetchError):
        resolve(unknown(server), tmp_path)
    server.files[f"/{NAME}"] = Content(OTHER)
    if ignore_if_range:
        server.faults = [Fault(ignore_if_range=True)]
        with pytest.raises(FetchError, match="does not resume"):
            resolve(unknown(server), tmp_path)
    assert resolve(unknown(server), tmp_path).read_bytes() == OTHER


@pytest.mark.usefixtures("one_attempt")
def test_a_part_from_another_address_is_not_gone_on_with(server: FaultServer, tmp_path: Path) -> None:
    server.files["/other.safetensors"] = Content(OTHER, etag=server.files[f"/{NAME}"].etag)
    server.faults = [Fault(cut=150_000)]
    with pytest.raises(FetchError):
        resolve(unknown(server), tmp_path)
    moved = record(UrlSource(f"{server.url}/other.safetensors"))
    assert resolve(moved, tmp_path).read_bytes() == OTHER


@pytest.mark.usefixtures("one_attempt")
@pytest.mark.parametrize("make", [known, unknown])
def test_without_versions_only_a_known_hash_allows_going_on(
    server: FaultServer, tmp_path: Path, make
) -> None:
    server.files[f"/{NAME}"] = Content(BODY, etag="")
    server.faults = [Fault(cut=150_000)]
    with pytest.raises(FetchError):
        resolve(make(server), tmp_path)
    assert resolve(make(server), tmp_path).read_bytes() == BODY
    assert ("range" in server.gets()[1].headers) is (make is known)


@pytest.mark.parametrize("make", [known, unknown])
def test_a_whole_part_is_not_fetched_again(server: FaultServer, tmp_path: Path, make) -> None:
    part(tmp_path).write_bytes(BODY)
    etag = server.files[f"/{NAME}"].etag
    part(tmp_path).with_name(f"{NAME}.part.id").write_text(f"{server.url}/{NAME}\n{etag}")
    assert resolve(make(server), tmp_path).read_bytes() == BODY
    assert server.sent == 0


def test_a_size_that_differs_is_told_before_anything_is_fetched(server: FaultServer, tmp_path: Path) -> None:
    wanted = record(UrlSource(f"{server.url}/{NAME}"), size=len(BODY) + 5)
    with pytest.raises(FetchError, match=f"{len(BODY)} bytes.*{len(BODY) + 5}"):
        resolve(wanted, tmp_path)
    assert leftovers(tmp_path) == set()


def test_a_full_disk_is_told_before_anything_is_fetched(
    server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(FetchError, match=f"{len(BODY)} bytes.*1000 bytes free"):
        resolve(known(server), tmp_path)
    assert leftovers(tmp_path) == set()


def test_a_folder_that_cannot_be_made_is_told(server: FaultServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FetchError, match="by hand"):
        resolve(known(server), tmp_path / "file")


def test_nothing_is_written_through_a_link(server: FaultServer, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / f"{NAME}.part").symlink_to(victim)
    (folder / f"{NAME}.part.id").symlink_to(victim)
    (folder / NAME).symlink_to(tmp_path / "nowhere")
    assert resolve(known(server), folder).read_bytes() == BODY
    assert victim.read_bytes() == b"precious" and not (tmp_path / "nowhere").exists()
    assert not (folder / NAME).is_symlink()


def test_killed_in_the_middle_it_goes_on(server: FaultServer, tmp_path: Path) -> None:
    server.faults = [Fault(stall=131_072)]
    process = SPAWN.Process(target=fetch, args=(unknown(server), tmp_path))
    process.start()
    while not (part(tmp_path).exists() and part(tmp_path).stat().st_size == 131_072):
        assert process.is_alive()
        time.sleep(0.02)
    process.kill()
    process.join()
    assert not (tmp_path / NAME).exists()
    server.forget()
    assert resolve(unknown(server), tmp_path).read_bytes() == BODY
    assert server.sent == len(BODY) - 131_072


def test_two_processes_make_one_download(server: FaultServer, tmp_path: Path) -> None:
    server.rate = 600_000
    barrier = SPAWN.Barrier(2)
    processes = [SPAWN.Process(target=fetch, args=(known(server), tmp_path, barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / NAME).read_bytes() == BODY and server.sent == len(BODY)


def test_threads_make_one_download_and_a_waiting_one_can_stop(
    server: FaultServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server.rate = 200_000
    first = threading.Thread(target=resolve, args=(known(server), tmp_path))
    first.start()
    while not part(tmp_path).exists():
        time.sleep(0.01)
    with pytest.raises(FetchError, match="stopped by the user"):
        resolve(known(server), tmp_path, cancelled=lambda: True)
    assert "waiting for it" in caplog.text
    assert resolve(known(server), tmp_path).read_bytes() == BODY
    first.join()
    assert server.sent == len(BODY)
