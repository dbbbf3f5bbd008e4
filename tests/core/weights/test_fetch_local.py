"""Files that are there: used without a connection, checked at every load; and addresses that are refused."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import deltaconv_core.weights.fetch as fetch_module
from deltaconv_core import FetchError
from deltaconv_core.weights import manifest as manifest_module
from deltaconv_core.weights.fetch import resolve
from deltaconv_core.weights.fetch.address import ALLOW_LOOPBACK, check_address
from deltaconv_core.weights.manifest import HubSource, RepositorySource, UrlSource
from testing.weight_records import leftovers, record, sha256, weights

BODY = weights(5_000)
NAME = "weights.safetensors"
URL = UrlSource("https://example.com/weights.safetensors")
HUB = HubSource("owner/name", NAME)


@pytest.fixture(autouse=True)
def no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in this file may open a socket or look up a name."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def place(folder: Path, body: bytes = BODY) -> Path:
    path = folder / NAME
    path.write_bytes(body)
    return path


def change_unseen(path: Path) -> None:
    """Invert the last byte in place and put the modification time back."""
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 0xFF]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("source", [URL, HUB], ids=["https", "hub"])
@pytest.mark.parametrize("body", [BODY, None], ids=["known", "unknown"])
def test_a_file_that_is_there_needs_no_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: UrlSource | HubSource, body: bytes | None
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    path = place(tmp_path)
    for _ in range(2):
        assert resolve(record(source, body), tmp_path) == path


def test_importing_and_using_a_file_loads_no_network_library(tmp_path: Path) -> None:
    place(tmp_path)
    code = (
        "import sys, pathlib, deltaconv_core.weights.fetch, deltaconv_core.weights.manifest as m\n"
        "assert m.load_manifest().names()\n"
        "from testing.weight_records import fetch, record\n"
        f"fetch(record(m.{HUB!r}), pathlib.Path({str(tmp_path)!r}))\n"
        "print(sorted({'requests', 'huggingface_hub', 'httpx'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_an_unknown_hash_is_trusted_once_and_said_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = place(tmp_path)
    resolve(record(URL), tmp_path)
    assert "trusted now" in caplog.text and sha256(BODY) in caplog.text
    pin = tmp_path / f"{NAME}.sha256"
    assert pin.read_text() == f"{sha256(BODY)}  {NAME}\n"
    caplog.clear()
    resolve(record(URL), tmp_path)
    assert caplog.text == ""
    change_unseen(path)
    with pytest.raises(FetchError, match=f"{sha256(BODY)} by {pin.name}.*delete {pin}"):
        resolve(record(URL), tmp_path)
    pin.unlink()
    resolve(record(URL), tmp_path)


def test_a_known_hash_needs_no_pin(tmp_path: Path) -> None:
    path = place(tmp_path)
    resolve(record(URL, BODY), tmp_path)
    assert leftovers(tmp_path) == {NAME}
    change_unseen(path)
    with pytest.raises(FetchError, match="by the manifest; delete it to have it fetched again"):
        resolve(record(URL, BODY), tmp_path)
    assert path.exists()


def test_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    place(tmp_path, BODY[:-1])
    with pytest.raises(FetchError, match=f"{len(BODY) - 1} bytes, expected {len(BODY)}"):
        resolve(record(URL, BODY), tmp_path)


@pytest.mark.parametrize("text", ["", "nonsense\n", "a" * 63 + "  x"])
def test_a_damaged_pin_is_told(tmp_path: Path, text: str) -> None:
    place(tmp_path)
    (tmp_path / f"{NAME}.sha256").write_text(text)
    with pytest.raises(FetchError, match="sha256 and does not"):
        resolve(record(URL), tmp_path)


def test_a_folder_that_cannot_be_written_to_can_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = place(tmp_path)

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert resolve(record(URL), tmp_path) == path
    assert "cannot be pinned" in caplog.text


def test_a_file_is_hashed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place(tmp_path)
    blocks = 0

    def count() -> bool:
        nonlocal blocks
        blocks += 1
        return False

    def load() -> int:
        nonlocal blocks
        blocks = 0
        resolve(record(URL, BODY), tmp_path, cancelled=count)
        return blocks

    assert load() == load() == 1  # too young to be remembered
    monkeypatch.setattr(time, "time", lambda: path.stat().st_ctime + 3)
    assert [load(), load()] == [1, 0]
    change_unseen(path)
    with pytest.raises(FetchError, match="sha256"):
        load()


def test_hashing_can_be_stopped(tmp_path: Path) -> None:
    place(tmp_path)
    with pytest.raises(FetchError, match="stopped by the user"):
        resolve(record(URL, BODY), tmp_path, cancelled=lambda: True)


def test_a_link_of_the_users_own_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / NAME).symlink_to(place(tmp_path / "disk"))
    assert resolve(record(URL, BODY), tmp_path / "models").read_bytes() == BODY


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "repository"
    (root / "demo").mkdir(parents=True)
    monkeypatch.setattr(manifest_module, "REPOSITORY", root)
    monkeypatch.setattr(fetch_module, "REPOSITORY", root)
    return root


def test_a_file_of_the_repository_is_used_in_place(repository: Path, tmp_path: Path) -> None:
    path = place(repository / "demo")
    wanted = record(RepositorySource(f"demo/{NAME}"), BODY)
    assert resolve(wanted, tmp_path / "models") == path
    assert not (tmp_path / "models").exists()
    change_unseen(path)
    with pytest.raises(FetchError, match="sha256.*restore it from the repository"):
        resolve(wanted, tmp_path / "models")
    path.unlink()
    with pytest.raises(FetchError, match="comes with the repository"):
        resolve(wanted, tmp_path / "models")


def test_a_link_out_of_the_repository_is_refused(repository: Path, tmp_path: Path) -> None:
    (repository / "demo" / NAME).symlink_to(place(tmp_path))
    with pytest.raises(FetchError, match="leads out of the repository"):
        resolve(record(RepositorySource(f"demo/{NAME}"), BODY), tmp_path)


def test_the_hub_can_be_told_to_stay_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FetchError) as caught:
        resolve(record(HUB), tmp_path)
    for word in ("offline", HUB.url, str(tmp_path), NAME):
        assert word.lower() in str(caught.value).lower()


REFUSED = [
    "http://example.com/a",
    "file:///etc/passwd",
    "ftp://example.com/a",
    "https://127.0.0.1/a",
    "https://127.9.9.9:8443/a",
    "https://localhost/a",
    "https://2130706433/a",
    "https://0x7f.1/a",
    "https://0.0.0.0/a",
    "https://10.1.2.3/a",
    "https://172.16.0.1/a",
    "https://192.168.1.1/a",
    "https://100.64.0.1/a",
    "https://169.254.169.254/latest/meta-data",
    "https://224.0.0.1/a",
    "https://[::1]/a",
    "https://[::]/a",
    "https://[fe80::1]/a",
    "https://[fd00::1]/a",
    "https://[::ffff:127.0.0.1]/a",
    "https://[::ffff:10.0.0.1]/a",
    "https://192.88.99.1/a",
    "https://localhost./a",
    "https://127.0.0.1./a",
    "https://10.0.0.1../a",
    "https://%31%32%37.0.0.1/a",
    "https://[fe80::1%25lo]/a",
    "https://[::127.0.0.1]/a",  # IPv4-compatible
    "https://[::93.184.216.34]/a",
    "https://[::ffff:0:127.0.0.1]/a",  # translated
    "https://[::ffff:0:93.184.216.34]/a",
    "https://[64:ff9b::7f00:1]/a",  # NAT64
    "https://[64:ff9b::a9fe:a9fe]/a",
    "https://[64:ff9b::192.168.1.1]/a",
    "https://[64:ff9b::192.88.99.1]/a",
    "https://[64:ff9b:1::7f00:1]/a",
    "https://[64:ff9b:1::93.184.216.34]/a",
    "https://[2002:7f00:1::]/a",  # 6to4
    "https://[2002:a9fe:a9fe::]/a",
    "https://[2002:c0a8:101::1]/a",
    "https://[2606:2800::5efe:10.0.0.1]/a",  # ISATAP
    "https://[2606:2800::200:5efe:10.0.0.1]/a",
    "https://[fec0::1]/a",
    "https://[5f00::1]/a",
    "https://[3fff::1]/a",
    "https://[100:0:0:1::1]/a",
    "https://[2001:db8::1]/a",
    "https://[2001:0:7f00:1::]/a",  # Teredo
]


@pytest.mark.parametrize("proxied", [False, True])
@pytest.mark.parametrize("url", REFUSED)
def test_an_address_that_a_manifest_must_not_use_is_refused(
    monkeypatch: pytest.MonkeyPatch, url: str, proxied: bool
) -> None:
    monkeypatch.delenv(ALLOW_LOOPBACK, raising=False)
    with pytest.raises(FetchError, match="refused"):
        check_address(url, proxied=proxied)


@pytest.mark.parametrize(
    "url",
    [
        "https://93.184.216.34/a",
        "https://[2606:2800:220:1:248:1893:25c8:1946]/a",
        "https://[64:ff9b::93.184.216.34]/a",  # how networks without IPv4 reach all of it
        "https://[2606:2800::200:5efe:93.184.216.34]/a",
    ],
)
def test_a_public_address_is_not_refused(url: str) -> None:
    check_address(url)


@pytest.mark.parametrize(
    "url",
    [
        "https://a:99999/a",
        "https://a:x/a",
        "https://[::1/a",
        "https:///a",
    ],
)
@pytest.mark.parametrize("proxied", [False, True])
def test_what_is_no_address_is_refused(url: str, proxied: bool) -> None:
    with pytest.raises(FetchError, match="refused"):
        check_address(url, proxied=proxied)


def test_a_name_that_leads_to_a_private_address_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(ALLOW_LOOPBACK, raising=False)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, 443)) for a in ("93.184.216.34", "192.168.0.7")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: answer)
    with pytest.raises(FetchError, match="refused.*192.168.0.7"):
        resolve(record(URL), tmp_path)
    assert leftovers(tmp_path) == set()


def test_behind_a_proxy_names_are_the_proxys_to_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    check_address("https://a-name-that-nobody-has.example/a", proxied=True)


def test_even_tests_reach_no_further_than_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOW_LOOPBACK, "1")
    check_address("http://127.0.0.1:8000/a")
    for url in ("http://93.184.216.34/a", "https://192.168.1.1/a", "file:///etc/passwd"):
        with pytest.raises(FetchError, match="refused"):
            check_address(url)
