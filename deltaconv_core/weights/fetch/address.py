"""Which addresses a manifest may send us to: https, and no machine of the user's own network.

Checked before every request, so before every hop of a redirect. That a name leads somewhere else a moment
later (DNS rebinding) is left to TLS: a server of the private network has no certificate for the name that
was asked for. Behind a proxy the names are the proxy's to look up; addresses written as numbers are checked
all the same.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.utils import select_proxy

from ...errors import FetchError

ALLOW_LOOPBACK = "DELTACONV_TEST_ALLOW_LOOPBACK"  # for tests: "1" allows this machine, with http too


def open_session() -> requests.Session:
    """A session that refuses addresses a manifest must not use, redirects included. Proxies and CAs as
    usual."""
    session = requests.Session()
    session.max_redirects = 10
    session.mount("https://", _CheckedAdapter())
    session.mount("http://", _CheckedAdapter())
    return session


class _CheckedAdapter(HTTPAdapter):
    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        check_address(request.url or "", proxied=bool(select_proxy(request.url or "", kwargs.get("proxies"))))
        return super().send(request, *args, **kwargs)


def check_address(url: str, *, proxied: bool = False) -> None:
    """Raise FetchError for anything but https to a public address."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    testing = os.environ.get(ALLOW_LOOPBACK) == "1"
    if parts.scheme != "https" and not (testing and parts.scheme == "http"):
        raise FetchError(f"refused {url}: only https is fetched")
    addresses = _addresses(host, parts.port or 443, proxied)
    if testing and addresses and all(address.is_loopback for address in addresses):
        return
    if parts.scheme != "https":
        raise FetchError(f"refused {url}: http is for this machine only")
    for address in addresses:
        if not address.is_global or address.is_multicast:
            raise FetchError(f"refused {url}: {host} is {address}, which is not a public address")


def _addresses(host: str, port: int, proxied: bool) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    flags = socket.AI_NUMERICHOST if proxied and host != "localhost" else 0
    try:
        entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    except (OSError, UnicodeError) as error:
        if proxied:
            return []
        raise requests.ConnectionError(f"{host}: {error}") from error
    return [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in entries]
