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

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NOT_PUBLIC = [
    ipaddress.ip_network(text)
    for text in (
        "192.88.99.0/24",  # relays of 6to4 (RFC 7526)
        "::/96",  # IPv4-compatible (RFC 4291, 2.5.5.1)
        "::ffff:0:0:0/96",  # IPv4-translated (RFC 7915)
        "64:ff9b:1::/48",  # NAT64 of one's own network (RFC 8215)
        "100::/32",  # discarded, and made up (RFC 6666, RFC 9780)
        "3fff::/20",  # documentation (RFC 9637)
        "5f00::/16",  # segment routing (RFC 9602)
        "fec0::/10",  # site-local (RFC 3879)
    )
]
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: networks without IPv4 reach all of it this way
_ISATAP = 0x5EFE  # RFC 5214: 0000:5efe or 0200:5efe in front of an IPv4 address

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
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port or 443
    except ValueError as error:
        raise FetchError(f"refused {url}: {error}") from error
    if not host or "%" in host:
        raise FetchError(f"refused {url}: it names no machine")
    testing = os.environ.get(ALLOW_LOOPBACK) == "1"
    if parts.scheme != "https" and not (testing and parts.scheme == "http"):
        raise FetchError(f"refused {url}: only https is fetched")
    addresses = _addresses(host, port, proxied)
    if testing and addresses and all(address.is_loopback for address in addresses):
        return
    if parts.scheme != "https":
        raise FetchError(f"refused {url}: http is for this machine only")
    for address in addresses:
        if not is_public(address):
            raise FetchError(f"refused {url}: {host} is {address}, which is not a public address")


def is_public(address: Address) -> bool:
    """Whether an address is one of the public network, and so is any IPv4 address that it stands for.

    What Python calls global differs from version to version, and IPv6 has several forms of IPv4 addresses,
    which a gateway or this machine translates back.
    """
    if not address.is_global or address.is_multicast or any(address in network for network in _NOT_PUBLIC):
        return False
    inner = _inner(address)
    return inner is None or is_public(inner)


def _inner(address: Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 address stands for."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    last = int(address) & 0xFFFFFFFF
    if address in _NAT64 or (int(address) >> 32) & 0xFDFFFFFF == _ISATAP:
        return ipaddress.IPv4Address(last)
    return address.sixtofour or address.ipv4_mapped


def _addresses(host: str, port: int, proxied: bool) -> list[Address]:
    flags = socket.AI_NUMERICHOST if proxied and not f".{host}".endswith(".localhost") else 0
    try:
        entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    except (OSError, UnicodeError) as error:
        if proxied:
            return []
        raise requests.ConnectionError(f"{host}: {error}") from error
    return [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in entries]
