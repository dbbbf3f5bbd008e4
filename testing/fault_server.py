"""A real HTTP server on loopback that misbehaves when told to, and a stand-in for the Hub on top of it."""

from __future__ import annotations

import argparse
import hashlib
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import BinaryIO
from urllib.parse import urlsplit

PIECE = 1 << 16
PAGE = b"<!DOCTYPE html><title>Sign in</title><p>Welcome to the hotel's network"


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one GET; several may be combined. Byte counts are of the body that is sent."""

    cut: int | None = None  # close the connection after so many bytes
    stall: int | None = None  # stop sending after so many bytes and keep the connection open
    flip: int | None = None  # invert the byte at this place of the file
    extra_length: int = 0  # state so many bytes more (or fewer) than there are
    no_length: bool = False  # state no length at all
    ignore_range: bool = False  # answer 200 with everything
    ignore_if_range: bool = False  # continue with a file that has changed
    redirect: str | None = None
    status: int | None = None
    page: bool = False  # send a web page instead
    plain_page: bool = False  # the same, and call it a file
    encoding: str | None = None  # state a content encoding
    header: tuple[str, str] | None = None  # state this too


@dataclass
class Seen:
    """One request as it came, and how many body bytes went out."""

    method: str
    path: str
    headers: dict[str, str]
    sent: int = 0


@dataclass
class Content:
    """A file of the server; `path` for one that is too large to keep in memory."""

    body: bytes = b""
    path: Path | None = None
    etag: str | None = None
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = self.path.stat().st_size if self.path else len(self.body)
        self.etag = f'"{hashlib.md5(self.body).hexdigest()}"' if self.etag is None else self.etag

    def digest(self, kind: str) -> str:
        digest = hashlib.new(kind)
        with self.open() as file:
            while block := file.read(PIECE):
                digest.update(block)
        return digest.hexdigest()

    def open(self) -> BinaryIO:
        return open(self.path, "rb") if self.path else io.BytesIO(self.body)


class FaultServer(ThreadingHTTPServer):
    """Serves `files`; each GET takes the next of `faults`, and behaves when none is left."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, Content] = {}
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.rate = 0.0  # bytes a second; 0: as fast as it goes
        self.closing = Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def gets(self) -> list[Seen]:
        return [request for request in self.seen if request.method == "GET"]

    @property
    def sent(self) -> int:
        return sum(request.sent for request in self.seen)

    def forget(self) -> None:
        self.seen.clear()
        self.faults.clear()


class HubServer(FaultServer):
    """Answers `/<owner>/<name>/resolve/<revision>/<file>` as the Hub does, by a redirect to storage.

    Storage is the same server by its other name, localhost, so that a token sent there is a token leaked.
    """

    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self) -> None:
        super().__init__()
        self.states_hash = True  # LFS hash as the etag; False: a plain git blob, as for a small file
        self.head_status: int | None = None
        self.head_page = False

    def add(self, repo: str, file: str, content: Content) -> None:
        self.files[f"/{repo}/{file}"] = content

    def headers_for(self, content: Content) -> dict[str, str]:
        digest = content.digest("sha256" if self.states_hash else "sha1")
        return {
            "X-Repo-Commit": self.COMMIT,
            "X-Linked-Etag": f'"{digest}"',
            "X-Linked-Size": str(content.size),
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        seen = self._note()
        if isinstance(self.server, HubServer):
            if self.server.head_page:
                return self._reply(200, {"Content-Type": "text/html", "ETag": '"page"'}, len(PAGE))
            if self.server.head_status:
                return self._reply(self.server.head_status, {}, 0)
        self._route(seen, Fault())

    def do_GET(self) -> None:
        seen = self._note()
        path = urlsplit(self.path).path
        # A Hub's faults are for the storage behind it, not for what its client asks on the way.
        spared = isinstance(self.server, HubServer) and path not in self.server.files
        self._route(seen, self.server.faults.pop(0) if self.server.faults and not spared else Fault())

    def _note(self) -> Seen:
        seen = Seen(self.command, self.path, {k.lower(): v for k, v in self.headers.items()})
        self.server.seen.append(seen)
        return seen

    def _route(self, seen: Seen, fault: Fault) -> None:
        path = urlsplit(self.path).path
        if isinstance(self.server, HubServer) and "/resolve/" in path:
            repo, _, rest = path.partition("/resolve/")
            key = f"{repo}/{rest.partition('/')[2]}"
            content = self.server.files.get(key)
            if content is None:
                return self._reply(404, {"X-Error-Code": "EntryNotFound"}, 0)
            storage = f"http://localhost:{self.server.server_port}{key}"
            return self._reply(302, {**self.server.headers_for(content), "Location": storage}, 0)
        content = self.server.files.get(path)
        if content is None:
            return self._reply(404, {}, 0)
        self._serve(seen, content, fault)

    def _reply(self, status: int, headers: dict[str, str], length: int | None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if length is None:
            self.close_connection = True
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def _serve(self, seen: Seen, content: Content, fault: Fault) -> None:
        if fault.status:
            return self._reply(fault.status, {}, 0)
        if fault.redirect:
            return self._reply(302, {"Location": fault.redirect}, 0)
        if fault.page or fault.plain_page:
            kind = "text/html; charset=utf-8" if fault.page else "application/octet-stream"
            self._reply(200, {"Content-Type": kind}, len(PAGE))
            return self._send(seen, io.BytesIO(PAGE), len(PAGE), Fault(), 0)
        headers = {"Content-Type": "application/octet-stream"}
        if content.etag:
            headers["ETag"] = content.etag
        if fault.encoding:
            headers["Content-Encoding"] = fault.encoding
        if fault.header:
            headers |= [fault.header]
        start = self._start(content, fault)
        if start is not None and start >= content.size:
            return self._reply(416, {**headers, "Content-Range": f"bytes */{content.size}"}, 0)
        if start is not None:
            headers["Content-Range"] = f"bytes {start}-{content.size - 1}/{content.size}"
        length = content.size - (start or 0)
        self._reply(
            206 if start is not None else 200,
            headers,
            None if fault.no_length else length + fault.extra_length,
        )
        if self.command == "GET":
            with content.open() as file:
                file.seek(start or 0)
                self._send(seen, file, min(length, length + fault.extra_length), fault, start or 0)

    def _start(self, content: Content, fault: Fault) -> int | None:
        """First byte asked for; None: the whole file."""
        asked = self.headers.get("Range", "")
        version = self.headers.get("If-Range")
        if not asked.startswith("bytes=") or fault.ignore_range:
            return None
        if version and version != content.etag and not fault.ignore_if_range:
            return None
        return int(asked.removeprefix("bytes=").partition("-")[0])

    def _send(self, seen: Seen, file: BinaryIO, length: int, fault: Fault, start: int) -> None:
        limit = min(x for x in (length, fault.cut, fault.stall) if x is not None)
        while seen.sent < limit:
            piece = bytearray(file.read(min(PIECE, limit - seen.sent)))
            at = (fault.flip if fault.flip is not None else -1) - start - seen.sent
            if 0 <= at < len(piece):
                piece[at] ^= 0xFF
            seen.sent += len(piece)  # before the other side can have read it, and ask for the sum
            try:
                self.wfile.write(piece)
            except OSError:  # the other side has gone
                seen.sent -= len(piece)
                break
            if self.server.rate:
                time.sleep(len(piece) / self.server.rate)
        if fault.stall is not None:
            self.server.closing.wait(60)
        if limit < length or fault.extra_length > 0:
            self.close_connection = True


@contextmanager
def serving(server: FaultServer) -> Iterator[FaultServer]:
    """Run a server in a thread."""
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def main() -> None:
    """Serve one file slowly, to see a fetch in a running ComfyUI: `python fault_server.py FILE`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rate", type=float, default=200_000, help="bytes a second (default: %(default)s)")
    options = parser.parse_args()
    with serving(FaultServer()) as server:
        server.rate = options.rate
        server.files[f"/{options.file.name}"] = Content(path=options.file)
        print("Set DELTACONV_TEST_ALLOW_LOOPBACK=1 for ComfyUI and put a record with this source into")
        print(f'models/deltaconv/manifest.json: {{"url": "{server.url}/{options.file.name}"}}')
        told = 0
        while True:
            time.sleep(0.5)
            for request in server.seen[told:]:
                print(request.method, request.path, request.headers.get("range", ""), flush=True)
            told = len(server.seen)


if __name__ == "__main__":
    main()
