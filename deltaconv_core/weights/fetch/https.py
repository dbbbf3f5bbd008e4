"""Fetching from an https address, resuming where a part ends."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

from ...errors import FetchError
from .part import Part

if TYPE_CHECKING:
    import requests

log = logging.getLogger(__name__)

CHUNK = 1 << 16  # bytes
TIMEOUT = (10.0, 30.0)  # seconds to connect, and without a byte
ATTEMPTS = 5  # in a row without a new byte
PAUSE = 1.0  # seconds before the second attempt, twice as long before each further one

_ADVICE = {
    401: "the server wants a login",
    403: "the server does not allow it",
    404: "there is no such file",
    429: "too many requests, try again later",
}


class _Passing(Exception):
    """A failure that another attempt may get over."""


def download(url: str, part: Part, size: int | None, sha256: str | None) -> None:
    """Bring the rest of the file into the part.

    Args:
        url: an https address; checked before every request.
        part: where the bytes go.
        size: bytes of the whole file; None: as the server says.
        sha256: of the whole file, when known. With it a part is resumed although the server gives no
            version of its file, because a wrong mix would be found out.

    Raises:
        FetchError: the address is refused, or the server does not give the file after several attempts.
    """
    if not part.identity.startswith(f"{url}\n") or (size is not None and part.tell() > size):
        part.restart(f"{url}\n")
    failures = 0
    while size is None or part.tell() < size:
        before = part.tell()
        try:
            return _attempt(url, part, size, sha256)
        except _Passing as error:
            failures = 1 if part.tell() > before else failures + 1
            if failures >= ATTEMPTS:
                raise FetchError(f"{url}: {error}") from error
            log.warning("%s: %s; trying again", url, error)
            if part.wait(PAUSE * 2 ** (failures - 1)):
                return


def _attempt(url: str, part: Part, size: int | None, sha256: str | None) -> None:
    import requests

    from .address import open_session

    headers = {"User-Agent": "ComfyUI-DeltaConv", "Accept-Encoding": "identity"}
    version = _version(part)
    if part.tell() and (version or sha256):
        headers["Range"] = f"bytes={part.tell()}-"
        if version:
            headers["If-Range"] = version
    try:
        with (
            open_session() as session,
            session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response,
        ):
            total = _begin(url, response, part)
            part.expect(total, size)
            _receive(response, part, total)
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        raise _Passing(f"the connection failed ({error})") from error
    except FetchError:
        raise
    except (
        requests.RequestException,
        ValueError,
    ) as error:  # ValueError: headers that are no addresses or numbers
        raise FetchError(f"{url}: {error}") from error


def _version(part: Part) -> str:
    return part.identity.partition("\n")[2]


def _begin(url: str, response: requests.Response, part: Part) -> int:
    """Make the part ready for the bytes of this response. Returns the bytes of the whole file."""
    headers = response.headers
    etag = headers.get("ETag", "")
    version = etag if etag.startswith('"') else headers.get("Last-Modified", "")
    span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", headers.get("Content-Range", ""))
    if response.status_code == 416 and span and int(span[2]) == part.tell():
        return part.tell()
    _refuse_what_is_no_file(response)
    if response.status_code == 206 and span and span[1] == str(part.tell()) and version == _version(part):
        return int(span[2])
    part.restart(f"{url}\n{version}")
    if response.status_code != 200:
        raise _Passing(f"the server does not resume where the last fetch stopped ({response.status_code})")
    if not headers.get("Content-Length", "").isdecimal():
        raise FetchError(f"{url}: the server does not say how long the file is")
    return int(headers["Content-Length"])


def _refuse_what_is_no_file(response: requests.Response) -> None:
    status, headers = response.status_code, response.headers
    advice = f"the server answers {status}: {_ADVICE.get(status, response.reason)}"
    if status == 429 or status >= 500:
        raise _Passing(advice)
    if status not in (200, 206, 416):
        raise FetchError(advice)
    if headers.get("Content-Type", "").startswith("text/html") and status != 416:
        raise FetchError(
            "the server sends a web page instead of the file (a login, or the page of a network's owner?)"
        )
    if headers.get("Content-Encoding", "identity") != "identity":
        raise FetchError(
            f"the server sends the file as {headers['Content-Encoding']}, which was not asked for"
        )


def _receive(response: requests.Response, part: Part, total: int) -> None:
    from tqdm import tqdm

    name = part.path.name.removesuffix(".part")
    with tqdm(total=total, initial=part.tell(), unit="B", unit_scale=True, desc=name) as bar:
        for chunk in response.iter_content(CHUNK):
            bar.update(part.write(chunk))
            if part.tell() > total:
                part.restart("")
                raise FetchError(f"the server sends more than the {total} bytes it promised")
    if part.tell() < total:
        raise _Passing(f"the connection was cut after {part.tell()} of {total} bytes")
